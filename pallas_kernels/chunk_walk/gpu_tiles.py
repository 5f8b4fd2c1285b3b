"""What Hopper's kernels that prepare a chunk for its walk share: squares of its tokens in registers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.chunk_walk import F32
from pallas_kernels.gated_recurrence.walk import SQUARE, WGMMA

plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX


def pair() -> tuple[Array, Array]:
    """The places of both tokens of a pair."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=WGMMA) for axis in (0, 1))


def pieces(a: Array, dtype: Any, n: int = 2) -> list[Array]:
    """Numbers in bfloat16 whose sum is a, to 8 n bits. Cut, not rounded: numbers are rounded fast in pairs alone."""
    found = []
    for _ in range(n - 1):
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(-(1 << 16)), F32)
        found.append(high.astype(dtype))
        a = a - high
    return [*found, a.astype(dtype)]


def call(kernel: Any, name: str, out: Any, scratch: Any, *grid: int) -> Any:
    """A kernel over chunks, rows and, it may be, blocks of columns."""
    return plgpu.kernel(
        kernel,
        out_type=tuple(out),
        scratch_types=scratch,
        grid=grid,
        grid_names=("chunk", "row", "block")[: len(grid)],
        # every buffer that is written is followed by commit_smem, which is a barrier
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        kernel_name=name,
    )
