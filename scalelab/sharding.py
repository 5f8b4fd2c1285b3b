"""Where arrays live: one mesh axis, `data`. The batch is split along it, parameters are copied to every device."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scalelab.errors import BadInput
from scalelab.schema import Config


def mesh(config: Config) -> Mesh:
    """The mesh of a run. Raises `BadInput` where the devices or the micro-batch cannot be split that way.

    Axes are of type Auto: the compiler places the intermediate arrays, the ends are ours to say.
    """
    available = jax.device_count()
    devices = config.mesh.data or available
    if devices > available:
        raise BadInput("config.mesh.data", devices, f"this machine has {available} device(s)")
    micro = config.data.batch_size // config.train.accum_steps
    if micro % devices:
        parts = f"over {config.train.accum_steps} accumulation step(s) it must be divisible by {devices} device(s)"
        remedy = f"{parts}; config.mesh.data takes fewer"
        raise BadInput("config.data.batch_size", config.data.batch_size, remedy)
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def put_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array | np.ndarray:
    """Rows of a batch -> an array split along `data`.

    For one device they stay as they are: the compiled step takes them in at a fraction of what placing them costs.
    """
    return rows if mesh.size == 1 else jax.device_put(rows, over_batch(mesh))
