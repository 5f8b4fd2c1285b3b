"""The recurrence on TPUs: the grid walks spans of tokens of a head's block of rows in order; the state and R stay in
VMEM. Products are of (rows, units) with (units, units), one a gate, in float32."""

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
from pallas_kernels.slstm import recurrence
from pallas_kernels.slstm.recurrence import F32, parts, sigmoid, tanh
from pallas_kernels.slstm.xla import EMPTY

LANES, SUBLANES = 128, 8
MOST_ROWS = 32  # of a block
VMEM = 16 * 2**20  # bytes that the compiler gives a kernel
LONGEST = 32  # tokens of a span
GATES = range(4)


def refusal(gates: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    d = gates.shape[-1]
    needed = vmem(rows(gates.shape[0]), d + -d % LANES, 1)
    return "" if needed <= VMEM else f"heads of width {d} take {needed / 2**20:.0f} MiB of VMEM, over {VMEM >> 20}"


def rows(batch: int) -> int:
    """Of a block: as many blocks as there must be, equal ones."""
    each = -(-batch // -(-batch // MOST_ROWS))
    return each + -each % SUBLANES


def vmem(rows: int, d: int, span: int) -> int:
    """Bytes of the backward pass: blocks twice, since the next arrive while one is worked on, and what a token works
    out."""
    return 4 * (2 * (4 * d * d + rows * d * (12 * span + 8)) + rows * d * 20)


def span(rows: int, d: int, T: int) -> int:
    """Tokens of a step of the grid."""
    return next(n for n in (LONGEST, 16, 8, 4, 2, 1) if (n <= T and vmem(rows, d, n) <= VMEM * 3 // 4) or n == 1)


def call(body: Any, name: str, arrays: Any, outputs: Any, reverse: bool) -> list[Array]:
    """A kernel over the grid of heads, tiles of rows and spans of tokens, with the references by name, and the number
    of tokens in the span. `arrays` and `outputs` (shapes) are named too, the array of all tokens' gates first."""
    heads, tiles, T, _, rows, d = next(iter(arrays.values())).shape
    Q = span(rows, d, T)
    spans = -(-T // Q)

    def at(i: Any) -> Any:
        return spans - 1 - i if reverse else i

    def tokens(*each: int) -> Any:
        return pl.BlockSpec((1, 1, Q, *each, rows, d), lambda h, b, i: (h, b, at(i), *(0 for _ in each), 0, 0))

    states = pl.BlockSpec((1, 1, 4, rows, d), lambda h, b, i: (h, b, 0, 0, 0))
    specs = dict.fromkeys(("wx", "raw", "d_gates"), tokens(4)) | {"states": tokens(3)}
    specs |= dict.fromkeys(("h", "dh"), tokens()) | dict.fromkeys(("start", "last", "d_last", "d_start"), states)
    specs |= {"R": pl.BlockSpec((1, 4, d, d), lambda h, b, i: (h, 0, 0, 0))}
    if "keep" in arrays:
        of = heads // arrays["keep"].shape[0]
        specs["keep"] = pl.BlockSpec((1, 1, Q, 1, rows), lambda h, b, i: (lax.div(h, jnp.int32(of)), b, at(i), 0, 0))
    names = (*arrays, *outputs, "S")

    def kernel(*refs: Any) -> None:
        i = pl.program_id(2)
        body(dict(zip(names, refs, strict=True)), i, jnp.minimum(Q, T - at(i) * Q))

    return pl.pallas_call(
        kernel,
        grid=(heads, tiles, spans),
        in_specs=[specs[a] for a in arrays],
        out_specs=[specs[a] for a in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, F32) for shape in outputs.values()],
        scratch_shapes=[pltpu.VMEM((4, rows, d), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=compat.tpu_interpreter() if dispatch.interpret() else False,
        name=name,
    )(*arrays.values())


def product(a: Array, b: Array, over: int) -> Array:
    """(rows, units) with (units before, units after), over these of b."""
    return lax.dot_general(a, b, (((1,), (over,)), ((), ())), precision=lax.Precision.HIGHEST)


def documents(keep: tuple[Array, ...]) -> dict[str, Array]:
    return {"keep": keep[0][:, :, :, None]} if keep else {}


def kept(ref: Any, t: Any) -> Array:
    """Whether each row's document goes on, as a column."""
    row = ref["keep"][0, 0, t]
    square = (row.shape[1], row.shape[1])
    same = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(jnp.int32, square, 1)
    return jnp.sum(jnp.where(same, row, 0.0), axis=1, keepdims=True)


def forward(wx, R, start, *keep, save):
    rows, d = wx.shape[-2:]

    def body(ref, i, count):
        @pl.when(i == 0)
        def _():
            ref["S"][...] = ref["start"][0, 0]

        def token(t, before):
            h, c, n, m = before
            if keep:
                old = kept(ref, t)
                h, c, n, m = old * h, old * c, old * n, old * m + (1.0 - old) * EMPTY
            raw = [ref["wx"][0, 0, t, g] + product(h, ref["R"][0, g], 0) for g in GATES]
            if save:
                for g in GATES:
                    ref["raw"][0, 0, t, g] = raw[g]
                for k, state in enumerate((c, n, m)):
                    ref["states"][0, 0, t, k] = state
            i, f, z, o = raw
            old_part, new_part, m = parts(i, f, m)
            c, n = old_part * c + new_part * tanh(z), old_part * n + new_part
            h = sigmoid(o) * c / n
            ref["h"][0, 0, t] = h
            return h, c, n, m

        after = lax.fori_loop(0, count, token, tuple(ref["S"][k] for k in range(4)))
        for k, state in enumerate(after):
            ref["S"][k] = state

        @pl.when(i == pl.num_programs(2) - 1)
        def _():
            ref["last"][0, 0] = ref["S"][...]

    arrays = {"wx": wx, "R": R, "start": start} | documents(keep)
    outputs = {"h": (*wx.shape[:3], rows, d), "last": start.shape}
    outputs |= {"raw": wx.shape, "states": (*wx.shape[:3], 3, rows, d)} if save else {}
    return call(body, "slstm_forward", arrays, outputs, reverse=False)


def backward(raw, states, R, dh, d_last, *keep):
    rows, d = raw.shape[-2:]

    def body(ref, i, count):
        @pl.when(i == 0)
        def _():
            ref["S"][...] = ref["d_last"][0, 0]
            ref["S"][0] = jnp.zeros((rows, d), F32)

        def token(index, after):
            t, (dh, dc, dn, _) = count - 1 - index, after
            i, f, z, o = (ref["raw"][0, 0, t, g] for g in GATES)
            c, n, m = (ref["states"][0, 0, t, k] for k in range(3))
            old_part, new_part, _ = parts(i, f, m)
            value, out, over_n = tanh(z), sigmoid(o), 1.0 / (old_part * n + new_part)
            h = out * over_n * (old_part * c + new_part * value)
            dh += ref["dh"][0, 0, t]
            dc += dh * out * over_n
            dn -= dh * h * over_n
            d_old = (dc * c + dn * n) * old_part
            gates = (
                (dc * value + dn) * new_part, d_old * sigmoid(-f), dc * new_part * (1.0 - value * value),
                dh * h * (1.0 - out),
            )  # fmt: skip
            for g in GATES:
                ref["d_gates"][0, 0, t, g] = gates[g]
            into = jnp.zeros_like(dh)
            for g in GATES:
                into += product(gates[g], ref["R"][0, g], 1)
            before = into, dc * old_part, dn * old_part, d_old
            return tuple(kept(ref, t) * b for b in before) if keep else before

        first = lax.fori_loop(0, count, token, tuple(ref["S"][k] for k in range(4)))
        for k, d_state in enumerate(first):
            ref["S"][k] = d_state

        @pl.when(i == pl.num_programs(2) - 1)
        def _():
            ref["d_start"][0, 0] = ref["S"][...]

    arrays = {"raw": raw, "states": states, "R": R, "dh": dh, "d_last": d_last} | documents(keep)
    outputs = {"d_gates": raw.shape, "d_start": d_last.shape}
    return call(body, "slstm_backward", arrays, outputs, reverse=True)


FORM = recurrence.Form(forward, backward, rows, side=-2, unit=LANES)
slstm = partial(recurrence.slstm, FORM)
