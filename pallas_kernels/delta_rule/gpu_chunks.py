"""What the delta rule's walk needs of each chunk, on Hopper: a kernel that works it out, and one for its gradients.

A thread block has one chunk of one head. The triangular system (I + A) X = R, with R the weighed values and keys, is
solved by the inverse T of I + A, which grows from blocks of 1 to blocks of 64 rows on the diagonal: with T the inverse
within blocks of h and B the part of A between the two blocks of a pair, that within blocks of 2 h is T - T B T. Each
product is three of bfloat16, of what both factors are in it and of what that leaves out: 16 bits. (With 8, one key
again and again with beta 2 is off by a third.)

Backwards, with dX the gradient of X, dR = T^T dX and dA = -dR X^T below the diagonal. What the decays' gradients need,
sums over the rows and the columns of a square, are products of its products with keys or queries: both sides of a sum
that cancels then hold the same roundings.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.chunk_walk.gpu import SHARED
from pallas_kernels.chunk_walk.gpu_tiles import call, pair, pieces
from pallas_kernels.gated_recurrence import sweeps
from pallas_kernels.gated_recurrence.walk import F32, SQUARE, TILED, WGMMA, L, columns_, multiply, rows
from pallas_kernels.population import folded

NAME = "mosaic_gpu"
plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
GATES = ("beta", "to", "of", "entering", "left")  # of each token
TWICE = ("beta", "entering")  # which are both a row and a column: Mosaic GPU finds no layout for one load as both


def refusal(q: Array, v: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if v.dtype != jnp.bfloat16:
        return f"takes bfloat16 values, not {v.dtype}"
    K, V = (width + -width % L for width in (q.shape[-1], v.shape[-1]))
    needed = 2 * L * (2 * K + V + max(K, V) + 4 * L) + 4 * L * 16  # backward, which takes more than forward
    return "" if needed <= SHARED else f"keys and values of {K} and {V} take {needed >> 10} kB of shared memory"


def in_chunks(
    q: Float[Array, "B T G dk"],
    k: Float[Array, "B T G dk"],
    v: Float[Array, "B T H dv"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None,
    reset: Bool[Array, "B T"] | None,
) -> tuple[Array, ...]:
    """As `xla.in_chunks` of chunks of L tokens, but -W for W, and widths padded to multiples of L."""
    # Behind a barrier: while it compiles, XLA spends seconds on sums of constants.
    none = lax.optimization_barrier(jnp.zeros(beta.shape, F32))
    gates = sweeps.gates_of(none if log_decay is None else log_decay.astype(F32), None, reset, L)
    gates["beta"] = sweeps.chunked(beta.astype(F32), L).reshape(gates["to"].shape)
    carried = gates.pop("carried").reshape(*gates["to"].shape[:2], -1, L)[..., -1:]
    documents = {name: gates.pop(name) for name in ("document_to", "document_of") if name in gates}
    q, k, v = (sweeps.widened(sweeps.padded(a.astype(v.dtype), L), L) for a in (q, k, v))
    return *_chunks(q, k, v, gates, documents), jnp.moveaxis(carried, 1, 2)


@jax.custom_vjp
def _chunks(q: Array, k: Array, v: Array, gates: Any, documents: Any) -> Any:
    return tuple(folded(partial(_forward, keep=False))(q, k, v, gates, documents))


def _kept(q: Array, k: Array, v: Array, gates: Any, documents: Any) -> Any:
    *out, inverse = folded(partial(_forward, keep=True))(q, k, v, gates, documents)
    return tuple(out), (q, k, v, gates, documents, inverse)


def _pulled(kept: Any, cotangents: Any) -> Any:
    q, k, v, gates, documents, inverse = kept
    d_read, d_write, d_erase, d_U, d_weights = (d.astype(q.dtype) for d in cotangents)
    d_q, d_k, d_v, sums = folded(_backward)(
        q, k, v, gates, documents, inverse, d_read, d_write, d_erase, d_U, d_weights
    )
    d_gates = {name: sums[:, :, i] for i, name in enumerate(GATES)}
    d_q, d_k = sweeps.of_groups(d_q, q), sweeps.of_groups(d_k, k)
    return d_q, d_k, d_v, d_gates, None


_chunks.defvjp(_kept, _pulled)


# ------------------------------------------------------------------------------------------------ what both share


class Tokens:
    """The gates of a chunk in shared memory: of queries or results, along rows; of sources, along columns."""

    def __init__(self, smem: Any, names: list[str]):
        self.smem, self.names = smem, names

    def row(self, name: str) -> Array:
        return rows(self.smem.at[self.names.index(name)])

    def vector(self, name: str) -> Array:
        return plgpu.load(self.smem.at[self.names.index(name)], layout=WGMMA.reduce(1))

    def column(self, name: str) -> Array:
        return columns_(self.smem.at[self.names.index(name + "_of" if name in TWICE else name)])

    def decay(self) -> Array:
        to, source = pair()
        seen = to >= source
        if "document_to" in self.names:
            seen = seen & (self.row("document_to") == self.column("document_of"))
        return jnp.exp2(jnp.where(seen, self.row("to") - self.column("of"), -jnp.inf))


def stacked(gates: Any, documents: Any) -> tuple[Array, list[str]]:
    """(B, H, R, C L), and the rows' names."""
    every = {name: gates[name] for name in GATES} | {name + "_of": gates[name] for name in TWICE} | documents
    return jnp.stack(list(every.values()), axis=2), list(every)


# ---------------------------------------------------------------------------------------------------------- forward


def _forward(q: Array, k: Array, v: Array, gates: Any, documents: Any, *, keep: bool) -> Any:
    """read, write, -W, U, weights and, with `keep`, the inverses (B, C, H, 2, L, L), as two numbers each."""
    (B, _, H, V), (G, K), C, dtype = v.shape, k.shape[2:], v.shape[1] // L, v.dtype
    gates, names = stacked(gates, documents)

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=TILED)

    def kernel(q_g, k_g, v_g, gates_g, read_g, write_g, erase_g, U_g, weights_g, *inverse_g, **s):
        c, row = lax.axis_index("chunk"), lax.axis_index("row")
        b, h = lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))
        g, tokens = lax.div(h, jnp.int32(H // G)), pl.ds(c * L, L)
        q, k, v, erase, high, low, square = (s[n] for n in ("q", "k", "v", "erase", "high", "low", "square"))
        for of, to in (q_g.at[b, tokens, g], q), (k_g.at[b, tokens, g], k), (v_g.at[b, tokens, h], v):
            plgpu.copy_gmem_to_smem(of, to, s["there"])
        plgpu.copy_gmem_to_smem(gates_g.at[b, h, :, tokens], s["gates"], s["there"])
        plgpu.barrier_wait(s["there"])
        token = Tokens(s["gates"], names)

        scores, likeness = multiply((q, k.T), (k, k.T))
        decay = token.decay()
        square[...] = (decay * scores).astype(dtype)
        to, source = pair()
        inverse = invert(jnp.where(to > source, token.row("beta") * decay * likeness, 0.0), high, low)
        if keep:
            store_halves(inverse, high, low)
        else:
            plgpu.commit_smem()  # of `square`
        plgpu.copy_smem_to_gmem(square, weights_g.at[b, c, h], commit_group=False)
        for gmem in inverse_g:
            for i, part in enumerate((high, low)):
                plgpu.copy_smem_to_gmem(part, gmem.at[b, c, h, i], commit_group=False)
        weighed = inverse * token.column("beta")
        left, rest = pieces(weighed, dtype)
        for j in range(0, V, L):
            (U,) = multiply((left, v.at[:, pl.ds(j, L)], None, (rest, v.at[:, pl.ds(j, L)])))
            U_g[b, c, h, :, pl.ds(j, L)] = U
        left, rest = pieces(weighed * token.column("entering"), dtype)
        for j in range(0, K, L):
            block = pl.ds(j, L)
            (W,) = multiply((left, k.at[:, block], None, (rest, k.at[:, block])))
            erase[:, block] = (-W).astype(dtype)
        plgpu.commit_smem()
        for smem, gate in (q, "entering"), (k, "left"):
            for j in range(0, K, L):
                block = smem.at[:, pl.ds(j, L)]
                block[...] = (plgpu.load(block, layout=WGMMA).astype(F32) * token.row(gate)).astype(dtype)
        plgpu.commit_smem()
        for smem, gmem in (q, read_g), (k, write_g), (erase, erase_g):
            plgpu.copy_smem_to_gmem(smem, gmem.at[b, c, h], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    wide = jax.ShapeDtypeStruct((B, C, H, L, K), dtype)
    out = [wide, wide, wide, jax.ShapeDtypeStruct((B, C, H, L, V), F32)]
    out += [jax.ShapeDtypeStruct((B, C, H, L, L), dtype)]
    out += [jax.ShapeDtypeStruct((B, C, H, 2, L, L), dtype)] if keep else []
    scratch = {name: tile(L, K) for name in ("q", "k", "erase")} | {"v": tile(L, V)}
    scratch |= {name: tile(L, L) for name in ("high", "low", "square")}
    scratch |= {"gates": plgpu.SMEM((len(names), L), F32), "there": plgpu.Barrier(num_arrivals=4)}
    return call(kernel, "delta_chunks", out, scratch, C, B * H)(q, k, v, gates)


def store_halves(a: Array, high: Any, low: Any) -> None:
    high[...], low[...] = pieces(a, high.dtype)
    plgpu.commit_smem()


def invert(A: Array, high: Any, low: Any) -> Array:
    """(I + A)^-1 of a strictly lower A, in registers; `high` and `low` are room in shared memory."""
    to, source = pair()

    def between(h: int) -> Array:
        """A's part between the two blocks of h rows of each pair."""
        of, at = lax.div(source, jnp.int32(h)), lax.div(to, jnp.int32(h))
        return jnp.where((at == of + 1) & (lax.rem(of, jnp.int32(2)) == 0), A, 0.0)

    def product(a: Array, b: Array) -> Array:
        store_halves(b, high, low)
        left, rest = pieces(a, high.dtype)
        (out,) = multiply((left, high, None, (left, low), (rest, high)))
        plgpu.commit_smem()  # no thread writes there while another's product still reads
        return out

    T = jnp.where(to == source, 1.0, 0.0) - between(1)
    h = 2
    while h < L:
        T = T - product(T, product(between(h), T))
        h *= 2
    return T


# --------------------------------------------------------------------------------------------------------- backward


def _backward(
    q: Array, k: Array, v: Array, gates: Any, documents: Any, inverse: Array, d_read: Array, d_write: Array,
    d_erase: Array, d_U: Array, d_weights: Array,
) -> Any:  # fmt: skip
    """Gradients of q and k (B, T, H, K), a head each; of v; and of `GATES` (B, H, 5, T)."""
    (B, T, H, V), (G, K), C, dtype = v.shape, k.shape[2:], v.shape[1] // L, v.dtype
    gates, names = stacked(gates, documents)

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=TILED)

    def kernel(q_g, k_g, v_g, gates_g, inverse_g, d_read_g, d_write_g, d_erase_g, d_U_g, d_weights_g, *out, **s):
        d_q_g, d_k_g, d_v_g, sums_g = out
        c, row = lax.axis_index("chunk"), lax.axis_index("row")
        b, h = lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))
        g, tokens = lax.div(h, jnp.int32(H // G)), pl.ds(c * L, L)
        q, k, v, d_X, high, low, square, X = (s[n] for n in ("q", "k", "v", "d_X", "high", "low", "square", "X"))

        def fetch(gmem: Any, j: int, there: Any) -> None:
            plgpu.copy_gmem_to_smem(gmem.at[b, c, h, :, pl.ds(j * L, L)], d_X.at[jnp.int32(j)], there)

        for of, to in (
            (q_g.at[b, tokens, g], q), (k_g.at[b, tokens, g], k), (v_g.at[b, tokens, h], v),
            (gates_g.at[b, h, :, tokens], s["gates"]), (inverse_g.at[b, c, h, 0], high),
            (inverse_g.at[b, c, h, 1], low), (d_weights_g.at[b, c, h], square),
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(of, to, s["there"])
        for j in range(V // L):
            fetch(d_U_g, j, s["there"])
        plgpu.barrier_wait(s["there"])
        token = Tokens(s["gates"], names)

        def of_row(a: Array, b: Array) -> Array:
            return jnp.sum(a * b, axis=1)

        def read(smem: Any) -> Array:
            return plgpu.load(smem, layout=WGMMA).astype(F32)

        def arriving(gmem: Any, block: Any) -> Array:
            return plgpu.load(gmem.at[b, c, h, :, block], layout=WGMMA, optimized=False).astype(F32)

        def weighed() -> Array:
            return (read(high) + read(low)) * token.column("beta")

        # the scores: of their gradient, that of q . k
        square[...] = (read(square) * token.decay()).astype(dtype)

        # the system: d_R = T^T d_X, and the sum of d_R X^T
        left, rest = pieces(weighed(), dtype)
        none = plgpu.layout_cast(jnp.zeros((L,), F32), WGMMA.reduce(1))

        def of_values(j: Any, sums: Any) -> Any:
            d_A, d_beta = sums
            mine, d_mine = v.at[:, pl.ds(j * L, L)], d_X.at[j]
            solved, d_right = multiply((left, mine, None, (rest, mine)), (high.T, d_mine, None, (low.T, d_mine)))
            d_beta = d_beta + of_row(d_right, read(mine))
            X[...] = solved.astype(dtype)
            plgpu.commit_smem()
            (d_A,) = multiply((d_right.astype(dtype), X.T, d_A))
            mine[...] = (token.row("beta") * d_right).astype(dtype)
            plgpu.commit_smem()
            return d_A, d_beta

        d_A, d_beta = lax.fori_loop(0, V // L, of_values, (plgpu.layout_cast(jnp.zeros(SQUARE, F32), WGMMA), none))
        plgpu.copy_smem_to_gmem(v, d_v_g.at[b, tokens, h])
        for j in range(K // L):
            fetch(d_erase_g, j, s["erase_there"])
        plgpu.barrier_wait(s["erase_there"])
        left, rest = pieces(weighed() * token.column("entering"), dtype)

        def of_keys(j: Any, sums: Any) -> Any:
            d_A, d_beta, d_entering = sums
            mine, d_mine = k.at[:, pl.ds(j * L, L)], d_X.at[j]
            solved, d_right = multiply((left, mine, None, (rest, mine)), (high.T, d_mine, None, (low.T, d_mine)))
            d_right = -d_right  # erase is -W
            along = of_row(d_right, read(mine))
            X[...] = solved.astype(dtype)
            plgpu.commit_smem()
            d_low = d_right.astype(dtype)
            (d_A,) = multiply((d_low, X.T, d_A))
            d_mine[...] = d_low
            plgpu.commit_smem()
            return d_A, d_beta + token.vector("entering") * along, d_entering + token.vector("beta") * along

        d_A, d_beta, d_entering = lax.fori_loop(0, K // L, of_keys, (d_A, d_beta, none))

        # of A, that of k . k
        (likeness,) = multiply((k, k.T))
        to, source = pair()
        d_A = jnp.where(to > source, -d_A, 0.0) * token.decay()
        d_beta = d_beta + of_row(d_A, likeness)
        high[...] = (token.row("beta") * d_A).astype(dtype)
        plgpu.commit_smem()

        def of_both(j: Any, sums: Any) -> Any:
            d_to, d_of, d_entering, d_left = sums
            block = pl.ds(j * L, L)
            q_j, k_j = q.at[:, block], k.at[:, block]
            to_k, of_k = multiply((high.T, k_j, None, (square.T, q_j)), (high, k_j))
            mine, came = read(k_j), arriving(d_write_g, block)
            d_left = d_left + of_row(came, mine)
            d_to, d_of = d_to + of_row(of_k, mine), d_of - of_row(to_k, mine)
            d_k = of_k + to_k + token.row("left") * came
            d_k = d_k + token.row("beta") * token.row("entering") * read(d_X.at[j])
            (of_q,) = multiply((square, k_j))
            mine, came = read(q_j), arriving(d_read_g, block)
            d_entering, d_to = d_entering + of_row(came, mine), d_to + of_row(of_q, mine)
            plgpu.commit_smem()  # all threads are done with both
            q_j[...] = (of_q + token.row("entering") * came).astype(dtype)
            k_j[...] = d_k.astype(dtype)
            return d_to, d_of, d_entering, d_left

        d_to, d_of, d_entering, d_left = lax.fori_loop(0, K // L, of_both, (none, none, d_entering, none))
        log_2 = math.log(2)
        for i, found in enumerate((d_beta, d_to * log_2, d_of * log_2, d_entering, d_left)):
            s["sums"][i] = found
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, d_q_g.at[b, tokens, h], commit_group=False)
        plgpu.copy_smem_to_gmem(k, d_k_g.at[b, tokens, h], commit_group=False)
        plgpu.copy_smem_to_gmem(s["sums"], sums_g.at[b, h, :, tokens])
        plgpu.wait_smem_to_gmem(0)

    own = jax.ShapeDtypeStruct((B, T, H, K), dtype)
    out = [own, own, jax.ShapeDtypeStruct(v.shape, dtype), jax.ShapeDtypeStruct((B, H, len(GATES), T), F32)]
    scratch = {"q": tile(L, K), "k": tile(L, K), "v": tile(L, V), "d_X": tile(max(K, V) // L, L, L)}
    scratch |= {name: tile(L, L) for name in ("high", "low", "square", "X")}
    scratch |= {"gates": plgpu.SMEM((len(names), L), F32), "sums": plgpu.SMEM((len(GATES), L), F32)}
    scratch |= {"there": plgpu.Barrier(num_arrivals=7 + V // L), "erase_there": plgpu.Barrier(num_arrivals=K // L)}
    return call(kernel, "delta_chunks_backward", out, scratch, C, B * H)(
        q, k, v, gates, inverse, d_read, d_write, d_erase, d_U, d_weights
    )
