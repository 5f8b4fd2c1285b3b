"""The recurrence on TPUs: the grid walks the chunks of a head in order, the state stays in VMEM between them.

A chunk takes four products: scores = q k^T, what the state gives q S, what k writes into the state k^T v', and the
decayed scores times v. The state is float32 and is rounded only as the operand of q S. A number for each token arrives
as a row, which its tokens lie along; a column is made of it on the diagonal of a square.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_recurrence import sweeps
from pallas_kernels.gated_recurrence.sweeps import F32, Gates

L = 128  # tokens of a chunk: the lanes
SQUARE = (L, L)
VMEM = 16 * 2**20  # bytes that the compiler gives a kernel
NEVER = -1e30  # exponent of what a token does not see


def refusal(q: Array, v: Array) -> str:
    """Why the kernel does not take these arguments; "" where it does."""
    if v.dtype not in (jnp.bfloat16, F32):
        return f"takes bfloat16 and float32, not {v.dtype}"
    dk, dv = q.shape[-1], v.shape[-1]
    size = jnp.dtype(v.dtype).itemsize
    needed = max(vmem(dk, dv, size, 1), vmem(dv, dk, size, 2))
    return "" if needed <= VMEM else f"a state of {dk} x {dv} takes {needed / 2**20:.0f} MiB of VMEM, over {VMEM >> 20}"


def vmem(K: int, V: int, size: int, states: int) -> int:
    """Bytes of a walk: blocks twice, since the next arrive while one is worked on, and what a chunk works out."""
    K, V = K + -K % L, V + -V % L
    blocks = size * (2 * L * K + 3 * L * V + states * K * V) + 4 * 2 * K * V + 4 * 16 * L
    return 2 * blocks + 4 * (2 * K * V + 3 * L * V + L * K + 4 * L * L)


def walk(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    gates: Gates,
    state: Float[Array, "B H K V"],
    *,
    reverse: bool = False,
    weigh: Float[Array, "B T Hw V"] | None = None,
    keep: bool = False,
    against: Float[Array, "B H C K V"] | None = None,
    share: Float[Array, "B H C V"] | None = None,
    eps: float = 0.0,
) -> dict[str, Array]:
    """As `sweeps` says, with N = 1; cross has a number for each value."""
    (B, T, _, V), (H, K) = v.shape, state.shape[1:3]
    C = T // L

    def at(c: Any) -> Any:
        return C - 1 - c if reverse else c

    def tokens(heads: int, width: int) -> Any:
        """Heads lie beside each other."""
        return pl.BlockSpec((1, L, width), lambda b, h, c: (b, at(c), lax.div(h, jnp.int32(H // heads))))

    def rows(heads: int, count: int) -> Any:
        return pl.BlockSpec((1, 1, count, L), lambda b, h, c: (b, lax.div(h, jnp.int32(H // heads)), 0, at(c)))

    def of_head(*shape: int) -> Any:
        return pl.BlockSpec((1, 1, *shape), lambda b, h, c: (b, h, 0, 0))

    def of_chunk(*shape: int) -> Any:
        return pl.BlockSpec((1, 1, 1, *shape), lambda b, h, c: (b, h, at(c), 0, 0))

    inputs, specs = {}, {}
    for name, a in {"q": q, "k": k, "v": v, "weigh": weigh}.items():
        if a is not None:
            specs[name] = tokens(*a.shape[2:])
            inputs[name] = a.reshape(B, T, -1)
    inputs["gates"] = jnp.stack(list(gates.values()), axis=2)
    specs["gates"] = rows(*inputs["gates"].shape[1:3])
    inputs["state"], specs["state"] = state, of_head(K, V)
    if against is not None:
        inputs["against"], specs["against"] = against, of_chunk(K, V)
    if share is not None:
        inputs["share"], specs["share"] = share[:, :, :, None], of_chunk(1, V)

    outputs = {"out": ((B, T, H * V), v.dtype, tokens(H, V)), "final": ((B, H, K, V), F32, of_head(K, V))}
    if weigh is not None:
        outputs["sums"] = (B, H, 2, T), F32, rows(H, 2)
    if keep:
        outputs["states"] = (B, H, C, K, V), v.dtype, of_chunk(K, V)
    if against is not None:
        outputs["cross"] = (B, H, C, 1, V), F32, of_chunk(1, V)
    if "bound" in gates:
        outputs["norm"] = (B, H, 1, T), F32, rows(H, 1)

    found = pl.pallas_call(
        partial(_chunk, tuple(inputs), tuple(gates), tuple(outputs), reverse, eps),
        grid=(B, H, C),
        in_specs=list(specs.values()),
        out_specs=[spec for *_, spec in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM((K, V), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=compat.tpu_interpreter() if dispatch.interpret() else False,
        name="gated_recurrence",
    )(*inputs.values())
    found = dict(zip(outputs, found, strict=True))
    found["out"] = found["out"].reshape(B, T, H, V)
    if weigh is not None:
        found["sums"] = found["sums"][:, :, None]
    if against is not None:
        found["cross"] = found["cross"][:, :, None, :, 0]
    if "bound" in gates:
        found["norm"] = found["norm"][:, :, 0]
    return found


def _chunk(
    inputs: tuple[str, ...], order: tuple[str, ...], outputs: tuple[str, ...], reverse: bool, eps: float, *refs: Any
) -> None:
    """One chunk of one head; `refs` are those of the inputs, the outputs and the state."""
    ref = dict(zip((*inputs, *outputs, "S"), refs, strict=True))
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _() -> None:
        ref["S"][...] = ref["state"][0, 0]

    S = ref["S"][...]
    q, k, v = (ref[name][0] for name in "qkv")
    to, source = (lax.broadcasted_iota(jnp.int32, SQUARE, axis) for axis in (0, 1))

    def row(name: str) -> Array:
        return ref["gates"][0, 0, order.index(name) : order.index(name) + 1]

    def column(name: str) -> Array:
        return jnp.sum(jnp.where(to == source, row(name), 0.0), axis=1, keepdims=True)

    def as_row(column: Array) -> Array:
        return jnp.sum(jnp.where(to == source, column, 0.0), axis=0, keepdims=True)

    of_later, of_earlier = (row, column) if reverse else (column, row)  # tokens of a pair
    seen = source >= to if reverse else to >= source
    if "document_to" in order:
        seen &= column("document_to") == row("document_of")
    decay = jnp.exp2(jnp.where(seen, of_later("to") - of_earlier("of"), NEVER))
    scores = product(q, k, (1, 1))
    inherited = product(q, S.astype(v.dtype), (1, 0))
    if "share" in ref:
        scores += of_later("bias")
        given = ref["share"][0, 0, 0]
        inherited += given if reverse else given * column("bias")
    entering, left = ("left", "entering") if reverse else ("entering", "left")
    inherited *= column(entering)
    weights = scores * decay
    inside = product(weights.astype(v.dtype), v, (1, 0))
    out = inherited + inside
    if "bound" in order:
        norm = jnp.sum(weights, axis=1, keepdims=True) + column("inherited")
        ref["norm"][0, 0] = as_row(norm)
        out /= jnp.maximum(jnp.abs(norm), column("bound")) + eps
    ref["out"][0] = out.astype(v.dtype)
    if "states" in ref:
        ref["states"][0, 0, 0] = S.astype(v.dtype)
    if "against" in ref:
        ref["cross"][0, 0, 0] = jnp.sum(ref["against"][0, 0, 0].astype(F32) * S, axis=0, keepdims=True)
    if "weigh" in ref:
        by = ref["weigh"][0].astype(F32)
        ref["sums"][0, 0, 0:1] = as_row(jnp.sum(by * inherited, axis=1, keepdims=True))
        ref["sums"][0, 0, 1:2] = as_row(jnp.sum(by * inside, axis=1, keepdims=True))

    weighted = (column(left) * v.astype(F32)).astype(v.dtype)
    keys = lax.broadcasted_iota(jnp.int32, (S.shape[0], L), 1)
    carried = jnp.sum(jnp.where(keys == L - 1, row("carried"), 0.0), axis=1, keepdims=True)
    S = carried * S + product(k, weighted, (0, 0))
    ref["S"][...] = S

    @pl.when(c == pl.num_programs(2) - 1)
    def _() -> None:
        ref["final"][0, 0] = S


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    # float32 is asked for by dtype, whatever the setting for products elsewhere
    precision = lax.Precision.HIGHEST if a.dtype == F32 else lax.Precision.DEFAULT
    dims = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


FORM = sweeps.Form(walk, L, unit=L, widest=lambda dv: dv)
gated_recurrence = partial(sweeps.gated_recurrence, FORM)
