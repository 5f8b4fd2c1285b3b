"""The scan on TPUs: the grid walks tiles of tokens of a block of channels in order, the states stay in VMEM between.

States lie on the sublanes, channels on the lanes, so that sums over the states of a channel are sums of registers. What
a token has for each state (B, C) arrives with the tokens along the lanes, from where a mask and a sum take one column.

The forward pass writes the state before every tile. The backward pass walks the tiles from the last to the first: it
runs the tile forward again, keeping the state before each token, then backward. dB and dC are sums over channels:
inside a block here, over the blocks in XLA.
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
from pallas_kernels.selective_scan import scan
from pallas_kernels.selective_scan.scan import F32

TILE = LANES = 128  # tokens of a tile, least channels of a block
SUBLANES = 8
SPAN = 8  # tokens that are written out one after the other
LARGEST_STATE = 128
KEPT = 4 * 2**20  # bytes of VMEM for a tile's states: of more, blocks are of the fewest channels


def refusal(u: Array, A: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if u.dtype not in (jnp.bfloat16, F32):
        return f"takes bfloat16 and float32, not {u.dtype}"
    return "" if A.shape[1] <= LARGEST_STATE else f"takes at most {LARGEST_STATE} states a channel, not {A.shape[1]}"


def sizes(T: int, E: int, N: int) -> tuple[int, int, int]:
    """As the kernels take them."""
    return T + -T % TILE, E + -E % LANES, N + -N % SUBLANES


def block(E: int, N: int) -> int:
    """Channels worked on at once."""
    return next(n for n in (4 * LANES, 2 * LANES, LANES) if E % n == 0 and (n == LANES or 4 * TILE * N * n <= KEPT))


def call(body: Any, name: str, arrays: Any, outputs: Any, scratch: Any, reverse: bool) -> list[Array]:
    """A kernel over the grid of rows, blocks of channels and tiles, with the references by name. `arrays`, `outputs`
    (shapes and dtypes) and `scratch` are named too."""
    (rows, T, E), (members, N, _) = arrays["u"].shape, arrays["A"].shape
    tiles, wide = T // TILE, block(E, N)

    def at(i: Any) -> Any:
        return tiles - 1 - i if reverse else i

    tokens = pl.BlockSpec((1, TILE, wide), lambda r, e, i: (r, at(i), e))
    along = pl.BlockSpec((1, N, TILE), lambda r, e, i: (r, 0, at(i)))
    state = pl.BlockSpec((1, N, wide), lambda r, e, i: (r, 0, e))
    sums = pl.BlockSpec((1, 1, N, TILE), lambda r, e, i: (r, e, 0, at(i)))
    specs = dict.fromkeys(("u", "dt", "y", "dy", "du", "ddt"), tokens) | dict.fromkeys("BC", along)
    specs |= dict.fromkeys(("start", "final", "d_start", "d_final", "dA"), state)
    specs |= {
        "A": pl.BlockSpec((1, N, wide), lambda r, e, i: (lax.div(r, jnp.int32(rows // members)), 0, e)),
        "forget": pl.BlockSpec((1, 1, TILE), lambda r, e, i: (r, 0, at(i))),
        "states": pl.BlockSpec((1, 1, N, wide), lambda r, e, i: (r, at(i), 0, e)),
        "dB": sums,
        "dC": sums,
    }
    names = (*arrays, *outputs, *scratch)
    return pl.pallas_call(
        lambda *refs: body(dict(zip(names, refs, strict=True))),
        grid=(rows, E // wide, tiles),
        in_specs=[specs[a] for a in arrays],
        out_specs=[specs[a] for a in outputs],
        out_shape=[jax.ShapeDtypeStruct(*a) for a in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=compat.tpu_interpreter() if dispatch.interpret() else False,
        name=name,
    )(*arrays.values())


def named(u: Array, dt: Array, A: Array, B: Array, C: Array, forget: tuple[Array, ...]) -> dict[str, Array]:
    arrays = {"u": u, "dt": dt} | {name: jnp.swapaxes(a, 1, 2) for name, a in (("A", A), ("B", B), ("C", C))}
    return arrays | ({"forget": forget[0][:, None]} if forget else {})


def column(row: Array, t: Any, N: int) -> Array:
    """What lies at lane t, for N sublanes."""
    here = lax.broadcasted_iota(jnp.int32, (N, TILE), 1) == t
    return jnp.sum(jnp.where(here, row, 0.0), axis=1, keepdims=True)


def decay(ref: Any, t: Any) -> Array:
    """Of every state at token t."""
    rates = ref["A"][0]
    exponent = ref["dt"][0, pl.ds(t, 1)] * rates
    return jnp.exp(exponent + column(ref["forget"][0], t, rates.shape[0]) if "forget" in ref else exponent)


def over_tokens(token: Any, start: Any, reverse: bool = False) -> Any:
    def some(k: Any, carry: Any) -> Any:
        for s in range(SPAN):
            t = k * SPAN + s
            carry = token(TILE - 1 - t if reverse else t, carry)
        return carry

    return lax.fori_loop(0, TILE // SPAN, some, start)


def forward(u, dt, A, B, C, start, *forget, keep):
    (rows, T, E), N = u.shape, A.shape[2]
    wide = block(E, N)

    def body(ref):
        i = pl.program_id(2)

        @pl.when(i == 0)
        def _():
            ref["h"][...] = ref["start"][0]

        if keep:
            ref["states"][0, 0] = ref["h"][...]
        ref["added"][...] = ref["dt"][0] * ref["u"][0].astype(F32)
        B, C = ref["B"][0], ref["C"][0]

        def token(t, h):
            h = decay(ref, t) * h + ref["added"][pl.ds(t, 1)] * column(B, t, N)
            ref["seen"][pl.ds(t, 1)] = jnp.sum(h * column(C, t, N), axis=0, keepdims=True)
            return h

        h = over_tokens(token, ref["h"][...])
        ref["h"][...] = h
        ref["y"][0] = ref["seen"][...].astype(u.dtype)

        @pl.when(i == pl.num_programs(2) - 1)
        def _():
            ref["final"][0] = h

    outputs = {"y": (u.shape, u.dtype), "final": ((rows, N, E), F32)}
    outputs |= {"states": ((rows, T // TILE, N, E), F32)} if keep else {}
    scratch = {"h": (N, wide), "added": (TILE, wide), "seen": (TILE, wide)}
    arrays = named(u, dt, A, B, C, forget) | {"start": jnp.swapaxes(start, 1, 2)}
    y, final, *states = call(body, "selective_scan_forward", arrays, outputs, scratch, reverse=False)
    return [y, jnp.swapaxes(final, 1, 2), *states]


def backward(u, dt, A, B, C, states, dy, d_final, *forget):
    (rows, T, E), N = u.shape, A.shape[2]
    wide = block(E, N)

    def body(ref):
        i = pl.program_id(2)

        @pl.when(i == 0)
        def _():
            ref["g"][...] = ref["d_final"][0]
            ref["sum"][...] = jnp.zeros_like(ref["sum"])

        u, dt = ref["u"][0].astype(F32), ref["dt"][0]
        ref["added"][...] = dt * u
        ref["seen"][...] = ref["dy"][0].astype(F32)
        A, B, C = ref["A"][0], ref["B"][0], ref["C"][0]
        lane = lax.broadcasted_iota(jnp.int32, (N, TILE), 1)

        def again(t, h):
            ref["before"][t] = h
            return decay(ref, t) * h + ref["added"][pl.ds(t, 1)] * column(B, t, N)

        def token(t, carry):
            g, dA, dB, dC = carry
            a, h, b = decay(ref, t), ref["before"][t], column(B, t, N)
            added, dy = ref["added"][pl.ds(t, 1)], ref["seen"][pl.ds(t, 1)]
            g += dy * column(C, t, N)
            dC = jnp.where(lane == t, jnp.sum(dy * (a * h + added * b), axis=1, keepdims=True), dC)
            dB = jnp.where(lane == t, jnp.sum(g * added, axis=1, keepdims=True), dB)
            ref["d_added"][pl.ds(t, 1)] = jnp.sum(g * b, axis=0, keepdims=True)
            g *= a
            d_exponent = g * h
            ref["d_rate"][pl.ds(t, 1)] = jnp.sum(d_exponent * A, axis=0, keepdims=True)
            return g, dA + d_exponent * ref["dt"][0, pl.ds(t, 1)], dB, dC

        over_tokens(again, ref["states"][0, 0])
        zero = jnp.zeros((N, TILE), F32)
        g, dA, dB, dC = over_tokens(token, (ref["g"][...], ref["sum"][...], zero, zero), reverse=True)
        ref["g"][...], ref["sum"][...] = g, dA
        ref["dB"][0, 0], ref["dC"][0, 0] = dB, dC
        d_added = ref["d_added"][...]
        ref["du"][0] = (d_added * dt).astype(ref["du"].dtype)
        ref["ddt"][0] = d_added * u + ref["d_rate"][...]

        @pl.when(i == pl.num_programs(2) - 1)
        def _():
            ref["dA"][0], ref["d_start"][0] = dA, g

    state, sums = ((rows, N, E), F32), ((rows, E // wide, N, T), F32)
    outputs = {"du": (u.shape, u.dtype), "ddt": (dt.shape, F32), "dA": state, "dB": sums, "dC": sums, "d_start": state}
    scratch = dict.fromkeys(("added", "seen", "d_added", "d_rate"), (TILE, wide))
    scratch |= {"before": (TILE, N, wide), "g": (N, wide), "sum": (N, wide)}
    arrays = named(u, dt, A, B, C, forget) | {"states": states, "dy": dy, "d_final": jnp.swapaxes(d_final, 1, 2)}
    du, ddt, *rest = call(body, "selective_scan_backward", arrays, outputs, scratch, reverse=True)
    return [du, ddt, *(jnp.swapaxes(a, -1, -2) for a in rest)]


FORM = scan.Form(forward, backward, sizes)
selective_scan = partial(scan.selective_scan, FORM)
