"""Kernels where several devices share a batch: the compiler cannot split a kernel, so each device is given its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


def per_device(run: Callable[..., Any], mesh: Mesh | None, shared: tuple[int, ...] = ()) -> Callable[..., Any]:
    """`run` on each device's part of its arrays, cut along their first axis by the mesh's axis `data`; all outputs are
    put together likewise. Arguments at the positions `shared` (weights) are whole everywhere, and their gradients the
    sum over the devices. Arguments may be None or trees. Without a mesh, or with one device: `run` itself."""
    if mesh is None or mesh.size == 1:
        return run

    def over_mesh(*arrays: Any) -> Any:
        specs = tuple(WHOLE if i in shared else ROWS for i in range(len(arrays)))
        # Kernels do not say along which axes their outputs vary, hence no check of it.
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(*arrays)

    return over_mesh
