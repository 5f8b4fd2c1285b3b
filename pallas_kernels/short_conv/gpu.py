"""The convolution's backward pass on Hopper, in Mosaic GPU: every array is read or written once.

A warpgroup has some channels of a span of tokens of one row, and walks them from the last to the first, a row of
channels at a time: a token's gradient then needs the sums' gradients of tokens that were met before, and its own sums
one more token of x, the oldest. Tiles of tokens arrive by TMA, two in flight, that of x earlier by K - 1 tokens; dx is
written over the gradient that it comes from. The K - 1 tokens behind a span, which another block has, are worked out
again. Sums for the taps and the bias: of a span here, over the spans in XLA.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.population import folded
from pallas_kernels.short_conv import xla
from pallas_kernels.short_conv.xla import F32

THREADS = 128
TILE = 8  # tokens staged at a time, and written out one after the other: one's loads hide behind another's arithmetic
SLOTS = 3  # tiles in shared memory: one that is worked on, one that arrives, and one that arrives or leaves
ALIGNED = 128  # bytes: where a copy by TMA may begin in shared memory
SPAN = 128  # tokens of a block


def refusal(x: Array, taps: Array) -> str:
    """Why the kernel does not take these arguments; "" where it does."""
    if x.dtype not in (jnp.bfloat16, F32):
        return f"takes bfloat16 and float32, not {x.dtype}"
    return "" if 2 <= len(taps) <= TILE else f"takes 2 to {TILE} taps, not {len(taps)}"


@jax.custom_vjp
def short_conv(x: Array, past: Array, taps: Array, bias: Array, seen: Array | None) -> Array:
    """As `xla.short_conv`. Channels and tokens are padded to multiples of THREADS and TILE: copies, but none at the
    sizes of training."""
    return xla.short_conv(x, past, taps, bias, seen)


def _forward(*arguments: Any) -> tuple[Array, Any]:
    return short_conv(*arguments), arguments


def _backward(kept: Any, d_out: Array) -> tuple[Array | None, ...]:
    x, past, taps, bias, seen = kept
    (_, T, E), K = x.shape, len(taps)

    def padded(a: Array, tokens: int, channels: int) -> Array:
        sizes = (*a.shape[:-2], a.shape[-2] + tokens, a.shape[-1] + channels)
        return lax.pad(a, jnp.zeros((), a.dtype), [(0, n - m, 0) for n, m in zip(sizes, a.shape, strict=True)])

    tokens, channels = -T % TILE, -E % THREADS
    weights = jnp.concatenate([taps.astype(F32), bias.astype(F32)[None]])[None]
    arrays = [padded(x, tokens, channels), padded(past, 0, channels), padded(weights, 0, channels)]
    arrays += [padded(d_out, tokens, channels)]
    if seen is not None:
        bits = jnp.int32(1) << jnp.arange(K - 1)
        arrays.append(jnp.pad(jnp.sum(jnp.where(seen, bits[:, None], 0), axis=1), ((0, 0), (0, tokens))))
    dx, d_past, sums = folded(_gradients, shared=(2,))(*arrays)
    sums = jnp.sum(sums, axis=(0, 1))[:, :E]
    return dx[:, :T, :E], d_past[..., :E], sums[:K].astype(taps.dtype), sums[K].astype(bias.dtype), None


short_conv.defvjp(_forward, _backward)


def _gradients(x: Array, past: Array, weights: Array, d_out: Array, *seen: Array) -> Any:
    """dx, d past, and of every span of tokens the gradients of taps and bias (rows, spans, K + 1, E). `weights`
    (members, K + 1, E): the bias behind the taps. `seen` (rows, T), if any: bit j of a token says whether it sees what
    tap j reaches."""
    (rows, T, E), K = x.shape, weights.shape[1] - 1
    members, spans = rows // weights.shape[0], -(-T // SPAN)
    block = 2 * THREADS if E % (2 * THREADS) == 0 else THREADS
    group = 2 if seen else TILE  # with more of them, what documents mask takes 133 registers
    layout = plgpu.Layout.WG_STRIDED((block,), vec_size=block // THREADS)

    def kernel(x_g: Any, past_g: Any, weights_g: Any, d_out_g: Any, *refs: Any) -> None:
        seen_g, (dx_g, d_past_g, sums_g, x_s, d_s, arrived, *seen_s) = refs[: len(seen)], refs[len(seen) :]
        row, span = lax.axis_index("row"), lax.axis_index("span")
        mine = pl.ds(lax.axis_index("block") * block, block)
        start = span * SPAN
        end = jnp.minimum(start + SPAN, T)
        tiles = lax.div(end - start, jnp.int32(TILE))

        def tokens(i: Any) -> Any:
            """The first of tile i, the tiles counted from the end."""
            return end - (i + 1) * TILE

        def fetch(i: Any) -> None:
            first, slot = tokens(i), lax.rem(i, jnp.int32(SLOTS))
            there = arrived.at[slot]
            earlier = x_s.at[slot, pl.ds(0, K - 1)]

            @pl.when(first == 0)
            def _() -> None:
                plgpu.copy_gmem_to_smem(past_g.at[row, :, mine], earlier, there)

            @pl.when(first > 0)
            def _() -> None:
                plgpu.copy_gmem_to_smem(x_g.at[row, pl.ds(first - K + 1, K - 1), mine], earlier, there)

            rest = pl.ds(first, TILE - K + 1)
            plgpu.copy_gmem_to_smem(x_g.at[row, rest, mine], x_s.at[slot, pl.ds(K - 1, TILE - K + 1)], there)
            plgpu.copy_gmem_to_smem(d_out_g.at[row, pl.ds(first, TILE), mine], d_s.at[slot], there)
            for g, s in zip(seen_g, seen_s, strict=True):
                plgpu.copy_gmem_to_smem(g.at[row, pl.ds(first, TILE)], s.at[slot, pl.ds(0, TILE)], there)

        def read(ref: Any) -> Array:
            return compat.gpu_load(ref, layout).astype(F32)

        for i in range(SLOTS - 1):
            pl.when(i < tiles)(partial(fetch, jnp.int32(i)))

        *taps, bias = (read(weights_g.at[lax.div(row, jnp.int32(members)), j, mine]) for j in range(K + 1))

        def token(carry: Any, oldest: Array, d_out: Array, sees: Any) -> tuple[Array, Any]:
            """dx of a token. The carry: the other tokens of its window, what dx of those before it and its own has so
            far, and the sums. `sees`: the token's bits; None: all."""
            others, begun, sums = carry
            window = [oldest, *others]

            def visible(a: Array, j: int) -> Array:
                return a if sees is None or j == K - 1 else a * jnp.where(sees & (1 << j) != 0, 1.0, 0.0)

            y = bias + sum(taps[j] * visible(window[j], j) for j in range(K))
            root = lax.rsqrt(1.0 + jnp.exp2(y * -math.log2(math.e)))
            sigmoid = root * root  # a quotient would be exact, in ten instructions
            d_y = d_out * (sigmoid * (1.0 + y * (1.0 - sigmoid)))
            to = [visible(d_y, j) for j in range(K)]
            given = [taps[j] * to[j] for j in reversed(range(K))]
            dx = begun[0] + given[0]
            begun = [*(a + b for a, b in zip(begun[1:], given[1:-1], strict=True)), given[-1]]
            sums = [*(s + d * x for s, d, x in zip(sums[:-1], to, window, strict=True)), sums[-1] + d_y]
            return dx, (window[:-1], begun, sums)

        # The tokens behind the span. Behind the last there are none: then any, with no gradient.
        def behind(k: int) -> Any:
            return jnp.minimum(end + k, T - 1)

        inside = jnp.where(end < T, 1.0, 0.0)
        none = plgpu.layout_cast(jnp.zeros((block,), F32), layout)
        carry: Any = [read(x_g.at[row, behind(k), mine]) for k in range(K - 1)], [none] * (K - 1), [none] * (K + 1)
        for k in reversed(range(K - 1)):
            sees: Any = seen_g[0][row, behind(k)] if seen else None
            d_out_k = read(d_out_g.at[row, behind(k), mine]) * inside
            carry = token(carry, read(x_g.at[row, end + k - K + 1, mine]), d_out_k, sees)[1]
        carry = (*carry[:2], [none] * (K + 1))

        def one_tile(i: Any, carry: Any) -> Any:
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.barrier_wait(arrived.at[slot])

            def some_tokens(k: Any, carry: Any) -> Any:
                for t in (TILE - 1 - k * group - m for m in range(group)):
                    sees: Any = seen_s[0][slot, t] if seen else None
                    dx, carry = token(carry, read(x_s.at[slot, t]), read(d_s.at[slot, t]), sees)
                    d_s[slot, t] = dx.astype(x.dtype)
                return carry

            carry = lax.fori_loop(0, TILE // group, some_tokens, carry)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_s.at[slot], dx_g.at[row, pl.ds(tokens(i), TILE), mine])

            @pl.when(i + SLOTS - 1 < tiles)
            def _() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for all but the copy that has just begun
                fetch(i + SLOTS - 1)

            return carry

        _, begun, sums = lax.fori_loop(0, tiles, one_tile, carry)
        for j in range(K + 1):
            sums_g[row, span, j, mine] = sums[j]

        @pl.when(span == 0)
        def _() -> None:
            for j in range(K - 1):
                d_past_g[row, K - 2 - j, mine] = begun[j].astype(x.dtype)

        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(past.shape, x.dtype),
            jax.ShapeDtypeStruct((rows, spans, K + 1, E), F32),
        ],
        scratch_types=[
            plgpu.SMEM((SLOTS, TILE, block), x.dtype),
            plgpu.SMEM((SLOTS, TILE, block), x.dtype),
            plgpu.Barrier(num_arrivals=3 + len(seen), num_barriers=SLOTS),
            *(plgpu.SMEM((SLOTS, ALIGNED // 4), jnp.int32) for _ in seen),
        ],
        grid=(rows, spans, E // block),
        grid_names=("row", "span", "block"),
        kernel_name="short_conv_backward",
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # Threads read and write what is theirs; the copy out comes after `commit_smem`, which is a barrier.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return tuple(run(x, past, weights, d_out, *seen))
