"""The walk on Hopper: one warpgroup has a block of 64 columns of values, the state in its registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.chunk_walk import F32, Arrays, Form
from pallas_kernels.gated_recurrence.walk import HALF, TILED, WGMMA, L, multiply

plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
SHARED = 227 * 1024  # bytes that one block may have


def refusal(q: Array, v: Array, widest: int) -> str:
    """Why the kernel does not take keys up to `widest` and values like these; "" where it does."""
    if v.dtype != jnp.bfloat16:
        return f"takes bfloat16 values, not {v.dtype}"
    return f"takes keys of a width up to {widest}, not {q.shape[-1]}" if q.shape[-1] > widest else ""


def walk(arrays: Arrays, reverse: bool, keep: bool) -> Arrays:
    """As `Form` says."""
    values, dtype = arrays["values"], arrays["read"].dtype
    (B, C, H, _, V), K = values.shape, arrays["read"].shape[-1]
    corrects = "erase" in arrays and not reverse  # values before they are written
    outputs = {
        "out": jax.ShapeDtypeStruct((B, C, H, L, V), dtype),
        "final": jax.ShapeDtypeStruct((B, H, K, V), F32),
        "states": jax.ShapeDtypeStruct((B, C, H, K, V), dtype) if keep else None,
        "x": jax.ShapeDtypeStruct((B, C, H, L, V), dtype) if keep and corrects else None,
    }
    outputs = {name: a for name, a in outputs.items() if a is not None}
    slots = buffers(K, "erase" in arrays, corrects)

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=TILED)

    ins = {name: tile(slots, L, K) for name in ("read", "write", "erase") if name in arrays}
    ins["values"] = plgpu.SMEM((slots, L, L), F32, transforms=TILED_F32) if corrects else tile(slots, L, L)
    ins |= {"weights": tile(slots, L, L), "carried": plgpu.SMEM((slots, K), F32)}
    scratch = {
        "ins": ins,
        "there": plgpu.Barrier(num_arrivals=len(ins), num_barriers=slots),
        "S_low": tile(K, L),
        "out_low": tile(L, L),
        "x_low": tile(L, L) if corrects else None,
    }

    def kernel(*refs, ins, there, S_low, out_low, x_low):
        gmem = dict(zip([*arrays, *outputs], refs, strict=True))
        n, row = lax.axis_index("n"), lax.axis_index("row")
        b, h = lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))
        columns = pl.ds(n * L, L)

        def place(i):
            return C - 1 - i if reverse else i

        def fetch(i):
            slot = lax.rem(i, jnp.int32(slots))
            for name in ins:
                of = gmem[name].at[b, place(i), h]
                of = of.at[:, columns] if name == "values" else of
                plgpu.copy_gmem_to_smem(of, ins[name].at[slot], there.at[slot])

        def store(smem, name, i):
            plgpu.copy_smem_to_gmem(smem, gmem[name].at[b, place(i), h, :, columns], commit_group=False)

        def step(i, S):
            slot = lax.rem(i, jnp.int32(slots))
            chunk = {name: ref.at[slot] for name, ref in ins.items()}
            plgpu.barrier_wait(there.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before: its buffers are free now
            S_low[...] = S.astype(dtype)
            plgpu.commit_smem()
            if keep:
                store(S_low, "states", i)
            x = chunk["values"]
            if corrects:
                (x,) = multiply((chunk["erase"], S_low, plgpu.load(x, layout=WGMMA)))
                x_low[...] = x.astype(dtype)
                plgpu.commit_smem()
                x = x_low
            rows = lax.broadcast_in_dim(plgpu.load(chunk["carried"], layout=WGMMA.reduce(1)), (K, L), [0])
            among = chunk["weights"].T if reverse else chunk["weights"]
            out, S = multiply((chunk["read"], S_low, None, (among, x)), (chunk["write"].T, x, rows * S))
            out_low[...] = out.astype(dtype)
            plgpu.commit_smem()
            store(out_low, "out", i)
            if keep and corrects:
                store(x_low, "x", i)
            plgpu.commit_smem_to_gmem_group()
            if "erase" in ins and reverse:
                (S,) = multiply((chunk["erase"].T, out_low, S))
                plgpu.commit_smem()
            pl.when(i + slots < C)(lambda: fetch(i + slots))
            return S

        for i in range(min(slots, C)):
            fetch(jnp.int32(i))
        S = plgpu.load(gmem["state"].at[b, h, :, columns], layout=WGMMA, optimized=False)
        gmem["final"][b, h, :, columns] = lax.fori_loop(0, C, step, S)
        plgpu.wait_smem_to_gmem(0)

    found = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=(V // L, B * H),
        grid_names=("n", "row"),
        # every buffer that is written is followed by commit_smem, which is a barrier
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        kernel_name="chunk_walk",
    )(*arrays.values())
    return dict(zip(outputs, found, strict=True))


def buffers(K: int, erases: bool, corrects: bool) -> int:
    """How many chunks are in shared memory at a time: as let two blocks share a multiprocessor, or two where even one
    chunk would not."""
    each = 2 * L * (K * (2 + erases) + L) + (4 if corrects else 2) * L * L + 4 * K
    once = 2 * L * (K + L * (1 + corrects))
    return 1 if once + each <= HALF < once + 2 * each or once + 2 * each > SHARED else 2


FORM = Form(walk, L, unit=L)
