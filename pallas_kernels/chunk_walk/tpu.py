"""The walk on TPUs: the grid walks the chunks of some heads in order, their states stay in VMEM between them.

A head's products wait for one another; those of several heads in one step overlap.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.chunk_walk import F32, Arrays, Form
from pallas_kernels.gated_recurrence.tpu import VMEM, L, product

TOGETHER = 4  # heads of a step, at most


def refusal(q: Array, v: Array, erases: bool) -> str:
    """Why the kernel does not take these arguments; "" where it does."""
    if v.dtype not in (jnp.bfloat16, F32):
        return f"takes bfloat16 and float32, not {v.dtype}"
    dk, dv = q.shape[-1], v.shape[-1]
    needed = vmem(dk, dv, jnp.dtype(v.dtype).itemsize, erases)
    return "" if needed <= VMEM else f"a state of {dk} x {dv} takes {needed / 2**20:.0f} MiB of VMEM, over {VMEM >> 20}"


def vmem(K: int, V: int, size: int, erases: bool) -> int:
    """Bytes of a head: blocks twice, since the next arrive while one is worked on, the state, and what the compiler
    puts aside of a chunk: of float32, the parts in bfloat16 that its products are made of."""
    K, V = K + -K % L, V + -V % L
    chunk = size * (L * K * (2 + erases) + L * L + L * V * (1 + erases) + K * V) + 4 * 8 * K
    chunk += (4 if erases else size) * L * V
    aside = 4 * K * V + 9 * L * V if size == 4 else K * V + L * V
    return 2 * (chunk + 4 * 2 * K * V) + 4 * (K * V + aside)


def together(H: int, each: int) -> int:
    """How many of H heads share a step, of so many bytes each."""
    return next(n for n in range(TOGETHER, 0, -1) if H % n == 0 and n * each <= max(VMEM, each))


def walk(arrays: Arrays, reverse: bool, keep: bool) -> Arrays:
    """As `Form` says."""
    values, dtype = arrays["values"], arrays["read"].dtype
    (B, C, H, _, V), K = values.shape, arrays["read"].shape[-1]
    erases = "erase" in arrays
    heads = together(H, vmem(K, V, dtype.itemsize, erases))

    def at(c: Any) -> Any:
        return C - 1 - c if reverse else c

    def of_chunk(rows: int, columns: int) -> Any:
        return pl.BlockSpec((None, None, heads, rows, columns), lambda b, h, c: (b, at(c), h, 0, 0))

    def of_head(rows: int, columns: int) -> Any:
        return pl.BlockSpec((None, heads, rows, columns), lambda b, h, c: (b, h, 0, 0))

    arrays = arrays | {"carried": arrays["carried"][..., None, :]}
    specs = {name: (of_head if name == "state" else of_chunk)(*a.shape[-2:]) for name, a in arrays.items()}
    outputs = {"out": ((B, C, H, L, V), dtype, of_chunk(L, V)), "final": ((B, H, K, V), F32, of_head(K, V))}
    if keep:
        outputs["states"] = (B, C, H, K, V), dtype, of_chunk(K, V)
    if keep and erases and not reverse:
        outputs["x"] = (B, C, H, L, V), dtype, of_chunk(L, V)

    found = pl.pallas_call(
        partial(_chunk, (*arrays, *outputs, "S"), heads, reverse),
        grid=(B, H // heads, C),
        in_specs=list(specs.values()),
        out_specs=[spec for *_, spec in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM((heads, K, V), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=compat.tpu_interpreter() if dispatch.interpret() else False,
        name="chunk_walk",
    )(*arrays.values())
    return dict(zip(outputs, found, strict=True))


def _chunk(names: tuple[str, ...], heads: int, reverse: bool, *refs: Any) -> None:
    """One chunk of some heads."""
    ref = dict(zip(names, refs, strict=True))
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _() -> None:
        ref["S"][...] = ref["state"][...]

    for h in range(heads):
        _head({name: a.at[h] for name, a in ref.items()}, reverse)

    @pl.when(c == pl.num_programs(2) - 1)
    def _() -> None:
        ref["final"][...] = ref["S"][...]


def _head(ref: dict[str, Any], reverse: bool) -> None:
    read, S = ref["read"][...], ref["S"][...]
    dtype, low = read.dtype, S.astype(read.dtype)
    if "states" in ref:
        ref["states"][...] = low
    x = ref["values"][...]
    if "erase" in ref and not reverse:
        x = (x + product(ref["erase"][...], low, (1, 0))).astype(dtype)
    if "x" in ref:
        ref["x"][...] = x
    out = product(read, low, (1, 0)) + product(ref["weights"][...], x, (0 if reverse else 1, 0))
    out = out.astype(dtype)
    ref["out"][...] = out
    S = column(ref["carried"][...]) * S + product(ref["write"][...], x, (0, 0))
    if "erase" in ref and reverse:
        S += product(ref["erase"][...], out, (0, 0))
    ref["S"][...] = S


def column(row: Array) -> Array:
    """Of a row, by the diagonal of a square."""
    down, along = (lax.broadcasted_iota(jnp.int32, (row.shape[1],) * 2, axis) for axis in (0, 1))
    return jnp.sum(jnp.where(down == along, row, 0.0), axis=1, keepdims=True)


FORM = Form(walk, L, unit=16)  # whole tiles of bfloat16; of the lanes a part will do
