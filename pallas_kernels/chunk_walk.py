"""What is left of a chunked recurrence when all that needs no state is done: a walk over the chunks, on Hopper.

Per head and chunk, with A the weights between its tokens and c what each row of the state keeps of itself,

    x = values + erase S;  out = read S + A x;  S <- c S + write^T x

`erase` may be missing. Given the gradient of out, the gradient D of the state walks from the last chunk to the first in
the same way, read and write exchanged and A transposed, but that erase comes last:

    dx = write D + A^T dout;  D <- c D + read^T dout + erase^T dx

so one kernel does both. It stores the states that it meets; the other gradients are products of what both walks left,
one for each chunk. One warpgroup has a block of 64 columns of values, the state in its registers in float32; it is
rounded only as the operand of products.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_recurrence.walk import F32, HALF, TILED, WGMMA, L, multiply
from pallas_kernels.population import folded

plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
SHARED = 227 * 1024  # bytes that one block may have


def refusal(q: Array, v: Array, widest: int) -> str:
    """Why the kernel does not take keys up to `widest` and values like these; "" where it does."""
    if v.dtype != jnp.bfloat16:
        return f"takes bfloat16 values, not {v.dtype}"
    return f"takes keys of a width up to {widest}, not {q.shape[-1]}" if q.shape[-1] > widest else ""


def recurrence(
    read: Float[Array, "B C H L K"],
    write: Float[Array, "B C H L K"],
    erase: Float[Array, "B C H L K"] | None,
    values: Float[Array, "B C H L V"],
    weights: Float[Array, "B C H L L"],
    carried: Float[Array, "B C H K"],
    state: Float[Array, "B H K V"] | None,
    tokens: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """(out in the dtype of `read`, of so many tokens; the last state). `values` are float32 where there is `erase`;
    `carried` and the states are always, the rest is in a 16-bit type. Widths are padded to multiples of L."""
    (B, _, H, _, V), K = values.shape, read.shape[-1]
    state = jnp.zeros((B, H, K, V), F32) if state is None else state.astype(F32)

    def whole(a: Array | None, *axes: int) -> Any:
        return a if a is None else jnp.pad(a, [(0, -n % L if i - a.ndim in axes else 0) for i, n in enumerate(a.shape)])

    keys = (whole(a, -1) for a in (read, write, erase))
    out, final = _walk(*keys, whole(values, -1), weights, whole(carried, -1), whole(state, -2, -1))
    out, final = out[..., :V], final[:, :, :K, :V]
    return jnp.moveaxis(out, 2, 3).reshape(B, -1, H, V)[:, :tokens], final


@jax.custom_vjp
def _walk(read: Any, write: Any, erase: Any, values: Any, weights: Any, carried: Any, state: Any) -> Any:
    swept = sweep(read, write, erase, values, weights, carried, state)
    return swept["out"], swept["final"]


def _forward(read: Any, write: Any, erase: Any, values: Any, weights: Any, carried: Any, state: Any) -> Any:
    swept = sweep(read, write, erase, values, weights, carried, state, keep=True)
    x = values if erase is None else swept["x"]
    return (swept["out"], swept["final"]), (read, write, erase, x, weights, carried, swept["states"])


def _backward(kept: Any, cotangents: Any) -> Any:
    (read, write, erase, x, weights, carried, S), (d_out, d_final) = kept, cotangents
    swept = sweep(write, read, erase, d_out, weights, carried, d_final, reverse=True, keep=True)
    d_x, D, d_state = swept["out"], swept["states"], swept["final"]

    def product(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=F32).astype(a.dtype)

    d_read, d_write = (product("bchtv,bchkv->bchtk", a, b) for a, b in ((d_out, S), (x, D)))
    d_erase = None if erase is None else product("bchtv,bchkv->bchtk", d_x, S)
    d_weights = product("bchtv,bchsv->bchts", d_out, x)
    d_carried = jnp.sum(S.astype(F32) * D.astype(F32), axis=-1)
    return d_read, d_write, d_erase, d_x if erase is None else d_x.astype(F32), d_weights, d_carried, d_state


_walk.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------ the kernel


def sweep(
    read: Array, write: Array, erase: Array | None, values: Array, weights: Array, carried: Array, state: Array,
    *, reverse: bool = False, keep: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """The walk: out (B, C, H, L, V) and final (B, H, K, V). With `keep`, states (B, C, H, K, V) as they are met, and x
    where it is not the values. With `reverse`, from the last chunk, the weights transposed, `erase` upon out."""
    arrays = {"read": read, "write": write, "erase": erase, "values": values, "weights": weights, "carried": carried}
    arrays = {name: a for name, a in (arrays | {"state": state}).items() if a is not None}
    call = folded(lambda *a: _sweep(dict(zip(arrays, a, strict=True)), reverse, keep))
    return dict(zip(("out", "final", "states", "x"), call(*arrays.values()), strict=False))


def _sweep(arrays: dict[str, Array], reverse: bool, keep: bool) -> list[Array]:
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

    return list(
        plgpu.kernel(
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
    )


def buffers(K: int, erases: bool, corrects: bool) -> int:
    """How many chunks are in shared memory at a time: as let two blocks share a multiprocessor, or two where even one
    chunk would not."""
    each = 2 * L * (K * (2 + erases) + L) + (4 if corrects else 2) * L * L + 4 * K
    once = 2 * L * (K + L * (1 + corrects))
    return 1 if once + each <= HALF < once + 2 * each or once + 2 * each > SHARED else 2
