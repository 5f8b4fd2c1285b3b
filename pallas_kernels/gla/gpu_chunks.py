"""What GLA's walk needs of each chunk, on Hopper: a kernel that works it out, and one for its gradients.

A thread block has one chunk of one head; backwards one block of its key channels. Scores come from blocks of every size
h, as in `xla`, which says why. All exponents are sums of log decays over a part of the chunk, M g with M of zeros and
ones: products for the tensor cores too, of g cut into three pieces of bfloat16, which hold float32. For each h the
queries of second blocks and the keys of first blocks, decayed towards the point between them, are the rows of one x;
the scores of the pairs are those of x x^T.

Backwards, with G the scores' gradient and its mirror image, of the pairs of h: dx = G x. The gradient of the sums that
end at a token, db, is q dq - k dk of all h; in it both sides of a pair hold the same roundings, so they cancel in the
log decays' gradient, which is its sum over the tokens from there on.

M and G come from shared memory: a factor in registers of which some numbers are the same in every thread ptxas 13.0
gives registers that it never sets.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.chunk_walk.gpu_tiles import call, pair, pieces
from pallas_kernels.chunks import documents
from pallas_kernels.gated_recurrence import sweeps
from pallas_kernels.gated_recurrence.walk import F32, SQUARE, TILED, WGMMA, L, columns_, multiply, rows
from pallas_kernels.population import folded

NAME = "mosaic_gpu"
plgpu: Any = mosaic_gpu  # what its annotations say differs between versions of JAX
SIZES = L.bit_length() - 1  # of blocks: 1, 2, 4 ... L / 2
PIECES = 3  # of a float32
MARKS = ("entering", "left", "document_to", "document_of")  # of each token, where there are documents


def in_chunks(
    q: Float[Array, "B T H dk"], k: Float[Array, "B T H dk"], log_decay: Float[Array, "B T H dk"],
    reset: Bool[Array, "B T"] | None,
) -> tuple[Array, ...]:  # fmt: skip
    """read, write, scores and carried as `xla.in_chunks` of chunks of L tokens, widths padded to multiples of L."""
    q, k, g = (sweeps.widened(sweeps.padded(a, L), L) for a in (q, k, log_decay.astype(F32)))
    if reset is None:
        read, write, weights, total = _chunks(q, k, g, None)
        return read, write, weights, jnp.exp(total)
    document = documents(reset, L)  # (B, C, 1, L)
    goes_on = document == 0
    marks = (goes_on, document == document[..., -1:], document, document)
    read, write, weights, total = _chunks(q, k, g, jnp.concatenate(marks, axis=2, dtype=F32))
    return read, write, weights, jnp.where(goes_on[..., -1:], jnp.exp(total), 0.0)


@jax.custom_vjp
def _chunks(q: Array, k: Array, g: Array, marks: Array | None) -> Any:
    """(read, write, weights, sums of g over each chunk (B, C, H, K))."""
    B, T, H, K = g.shape
    return *folded(_forward)(q, k, g, marks), jnp.sum(g.reshape(B, T // L, L, H, K), axis=2)


def _kept(*arrays: Any) -> Any:
    return _chunks(*arrays), arrays


def _pulled(arrays: Any, cotangents: Any) -> Any:
    *tiles, d_total = cotangents
    dtype = arrays[0].dtype
    return *folded(_backward)(*arrays, *(d.astype(dtype) for d in tiles), d_total), None


_chunks.defvjp(_kept, _pulled)


# ------------------------------------------------------------------------------------------------ what both share


def within(to: Array, of: Array, h: Any) -> Array:
    """M of blocks of h: what decays a query in the second of two, or a key in the first, towards the point between."""
    same = (to ^ of) < h
    return ones(same & jnp.where(second(to, h), of <= to, of > to))


def second(to: Array, h: Any) -> Array:
    return (to & h) != 0


def apart(to: Array, of: Array, h: Any) -> Array:
    """Whether the two lie in the two blocks of one pair."""
    return ((to ^ of) >= h) & ((to ^ of) < 2 * h)


def ones(where: Array) -> Array:
    return jnp.where(where, 1.0, 0.0).astype(jnp.bfloat16)


def by_size(one_size: Any, found: Any) -> Any:
    """`one_size(h, slot, found)` of every h, the slots by turns."""

    def two(i: Any, found: Any) -> Any:
        for slot in range(2):
            found = one_size(jnp.int32(1 << slot) << 2 * i, slot, found)
        return found

    return lax.fori_loop(0, SIZES // 2, two, found)


def sums(*squares: Any, of: Any) -> list[Array]:
    """M a for each of the squares M, all in shared memory, a in pieces."""
    first, *rest = of
    return multiply(*((M, first, None, *((M, piece) for piece in rest)) for M in squares))


def keep(a: Array, to: Any) -> None:
    """Into pieces in shared memory."""
    for smem, piece in zip(to, pieces(a, jnp.bfloat16, len(to)), strict=True):
        smem[...] = piece


def read(smem: Any) -> Array:
    return plgpu.load(smem, layout=WGMMA).astype(F32)


def arriving(gmem: Any) -> Array:
    return plgpu.load(gmem, layout=WGMMA, optimized=False)


def mark(smem: Any, name: str) -> Any:
    return smem.at[MARKS.index(name)]


def visible(to: Array, of: Array, marks: Any) -> Array:
    """Whether a later token of a pair sees the earlier one."""
    later = to > of
    if marks is None:
        return later
    return later & (rows(mark(marks, "document_to")) == columns_(mark(marks, "document_of")))


def tile(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)


def scratch_of(marks: Any, arrivals: int) -> dict[str, Any]:
    """Pieces of g; x and M, of which the next size's is written while this one's is read; the marks."""
    found = {"g_pieces": [tile(L, L)] * PIECES, "x": [tile(L, L)] * 2, "M": [tile(L, L)] * 2}
    found["there"] = plgpu.Barrier(num_arrivals=arrivals + (marks is not None))
    return found | ({} if marks is None else {"marks": plgpu.SMEM((len(MARKS), L), F32)})


# ---------------------------------------------------------------------------------------------------------- forward


def _forward(q: Array, k: Array, g: Array, marks: Array | None) -> Any:
    """read, write (B, C, H, L, K), weights (B, C, H, L, L)."""
    (B, T, H, K), dtype = q.shape, q.dtype
    C = T // L

    def kernel(q_g, k_g, g_g, *others, q, k, g_pieces, x, M, there, marks=None):
        *marks_g, read_g, write_g, weights_g = others
        c, row = lax.axis_index("chunk"), lax.axis_index("row")
        b, h = lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))
        tokens = pl.ds(c * L, L)
        for of, to in (q_g, q), (k_g, k):
            plgpu.copy_gmem_to_smem(of.at[b, tokens, h], to, there)
        for of in marks_g:
            plgpu.copy_gmem_to_smem(of.at[b, c], marks, there)
        plgpu.barrier_wait(there)
        to, of = pair()

        def of_columns(j: Any, scores: Array) -> Array:
            block = pl.ds(j * L, L)
            q_j, k_j = q.at[:, block], k.at[:, block]
            keep(arriving(g_g.at[b, tokens, h, block]) * math.log2(math.e), g_pieces)
            M[0][...] = within(to, of, 1)
            plgpu.commit_smem()

            def of_size(size: Any, slot: int, scores: Array) -> Array:
                (exponent,) = sums(M[slot], of=g_pieces)
                decayed = jnp.where(second(to, size), read(q_j), read(k_j)) * jnp.exp2(exponent)
                x[slot][...] = decayed.astype(dtype)
                M[1 - slot][...] = within(to, of, 2 * size)
                plgpu.commit_smem()
                (products,) = multiply((x[slot], x[slot].T))
                return scores + jnp.where(apart(to, of, size) & (to > of), products, 0.0)

            scores = by_size(of_size, scores)
            (products,) = multiply((q_j, k_j.T))
            scores = scores + jnp.where(to == of, products, 0.0)
            M[1][...] = ones(of <= to)
            plgpu.commit_smem()  # and no thread writes queries and keys there while another's product still reads
            left, entering = sums(*M, of=g_pieces)
            for smem, exponent, name in (q_j, entering, "entering"), (k_j, left, "left"):
                decayed = read(smem) * jnp.exp2(exponent)
                smem[...] = (decayed if marks is None else decayed * rows(mark(marks, name))).astype(dtype)
            plgpu.commit_smem()
            return scores

        scores = plgpu.layout_cast(jnp.zeros(SQUARE, F32), WGMMA)
        scores = lax.fori_loop(0, K // L, of_columns, scores)
        square = g_pieces[0]
        square[...] = jnp.where((to == of) | visible(to, of, marks), scores, 0.0).astype(dtype)
        plgpu.commit_smem()
        for smem, gmem in (q, read_g), (k, write_g), (square, weights_g):
            plgpu.copy_smem_to_gmem(smem, gmem.at[b, c, h], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    out = [jax.ShapeDtypeStruct((B, C, H, L, width), dtype) for width in (K, K, L)]
    scratch = {"q": tile(L, K), "k": tile(L, K)} | scratch_of(marks, 2)
    given = [q, k, g] if marks is None else [q, k, g, marks]
    return call(kernel, "gla_chunks", out, scratch, C, B * H)(*given)


# --------------------------------------------------------------------------------------------------------- backward


def _backward(
    q: Array, k: Array, g: Array, marks: Array | None, d_read: Array, d_write: Array, d_weights: Array, d_total: Array
) -> Any:
    """Gradients of q, k and g."""
    (B, T, H, K), dtype = q.shape, q.dtype
    C = T // L

    def kernel(*refs, q, k, came_read, came_write, g_pieces, x, M, G, total, there, marks=None):
        q_g, k_g, g_g, d_read_g, d_write_g, d_weights_g, d_total_g, *marks_g, d_q_g, d_k_g, d_g_g = refs
        c, row = lax.axis_index("chunk"), lax.axis_index("row")
        b, h = lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))
        tokens, block = pl.ds(c * L, L), pl.ds(lax.axis_index("block") * L, L)
        identity, square, came_weights = g_pieces  # at first
        for of, to in (
            (q_g.at[b, tokens, h, block], q), (k_g.at[b, tokens, h, block], k), (d_weights_g.at[b, c, h], came_weights),
            (d_read_g.at[b, c, h, :, block], came_read), (d_write_g.at[b, c, h, :, block], came_write),
            (d_total_g.at[b, c, h, block], total), *((of.at[b, c], marks) for of in marks_g),
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(of, to, there)
        to, of = pair()
        identity[...] = ones(to == of)
        M[0][...] = within(to, of, 1)
        plgpu.barrier_wait(there)
        d_scores = read(came_weights)
        itself = jnp.sum(jnp.where(to == of, d_scores, 0.0), axis=1)
        d_scores = jnp.where(visible(to, of, marks), d_scores, 0.0)
        square[...] = d_scores.astype(dtype)
        plgpu.commit_smem()
        (mirrored,) = multiply((square.T, identity))
        d_scores = d_scores + mirrored
        plgpu.commit_smem()
        keep(arriving(g_g.at[b, tokens, h, block]) * math.log2(math.e), g_pieces)
        plgpu.commit_smem()

        itself = lax.broadcast_in_dim(itself, SQUARE, [0])
        d_q, d_k = itself * read(k), itself * read(q)
        d_b = plgpu.layout_cast(jnp.zeros(SQUARE, F32), WGMMA)

        def of_size(size: Any, slot: int, found: Any) -> Any:
            d_q, d_k, d_b = found
            (exponent,) = sums(M[slot], of=g_pieces)
            decay, is_query = jnp.exp2(exponent), second(to, size)
            decayed = (jnp.where(is_query, read(q), read(k)) * decay).astype(dtype)
            x[slot][...] = decayed
            G[slot][...] = jnp.where(apart(to, of, size), d_scores, 0.0).astype(dtype)
            M[1 - slot][...] = within(to, of, 2 * size)
            plgpu.commit_smem()
            (d_x,) = multiply((G[slot], x[slot]))
            d_decayed, along = d_x * decay, d_x * decayed.astype(F32)
            d_q, d_k = d_q + jnp.where(is_query, d_decayed, 0.0), d_k + jnp.where(is_query, 0.0, d_decayed)
            return d_q, d_k, d_b + jnp.where(is_query, along, -along)

        d_q, d_k, d_b = by_size(of_size, (d_q, d_k, d_b))
        M[1][...] = ones(of <= to)
        plgpu.commit_smem()
        left, entering = sums(*M, of=g_pieces)
        came = read(came_read) * jnp.exp2(entering)
        came = came if marks is None else came * rows(mark(marks, "entering"))
        d_q, d_b = d_q + came, d_b + came * read(q)
        came = read(came_write) * jnp.exp2(left)
        came = came if marks is None else came * rows(mark(marks, "left"))
        d_k, d_left = d_k + came, came * read(k)
        left_pieces = came_read, came_write
        plgpu.commit_smem()  # all are done with what is written now
        keep(d_b, g_pieces)
        keep(d_left, left_pieces)
        q[...], k[...] = d_q.astype(dtype), d_k.astype(dtype)
        plgpu.commit_smem()
        before, after = M[0].T, M[1].T  # of M, which says what decays a token, what a token decays
        others = [(after, piece) for piece in g_pieces[1:]] + [(before, piece) for piece in left_pieces]
        (d_g,) = multiply((after, g_pieces[0], columns_(total), *others))
        d_g_g[b, tokens, h, block] = d_g
        for smem, gmem in (q, d_q_g), (k, d_k_g):
            plgpu.copy_smem_to_gmem(smem, gmem.at[b, tokens, h, block], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    out = [
        jax.ShapeDtypeStruct(q.shape, dtype),
        jax.ShapeDtypeStruct(q.shape, dtype),
        jax.ShapeDtypeStruct(g.shape, F32),
    ]
    scratch = {name: tile(L, L) for name in ("q", "k", "came_read", "came_write")}
    scratch |= scratch_of(marks, 6) | {"G": [tile(L, L)] * 2, "total": plgpu.SMEM((L,), F32)}
    given = [q, k, g, d_read, d_write, d_weights, d_total] + ([] if marks is None else [marks])
    return call(kernel, "gla_chunks_backward", out, scratch, C, B * H, K // L)(*given)
