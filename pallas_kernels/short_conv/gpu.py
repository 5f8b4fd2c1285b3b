"""The convolution on Hopper, in Mosaic GPU: every array is read or written once.

A warpgroup has some channels of a span of tokens of one row, and walks them a row of channels at a time, its window of
K tokens in registers. Tiles of tokens arrive by TMA, two in flight; what is written lies over what was read.

Backwards it goes from the last token to the first: a token's gradient then needs the sums' gradients of tokens that
were met before, and its own sums one more token of x, the oldest, so that tiles of x are earlier by K - 1 tokens. The
K - 1 tokens behind a span, which another block has, are worked out again. Sums for the taps and the bias: of a span
here, over the spans in XLA.
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
    T, E = x.shape[1:]
    if T < TILE:  # a token or a few, as in decoding: the copies would be most of it
        return xla.short_conv(x, past, taps, bias, seen)
    return folded(_values, shared=(2,))(*_whole(x, past, taps, bias, seen))[:, :T, :E]


def _forward(*arguments: Any) -> tuple[Array, Any]:
    return short_conv(*arguments), arguments


def _backward(kept: Any, d_out: Array) -> tuple[Array | None, ...]:
    x, _, taps, bias, _ = kept
    (_, T, E), K = x.shape, len(taps)
    x, past, weights, *bits = _whole(*kept)
    dx, d_past, sums = folded(_gradients, shared=(2,))(x, past, weights, padded(d_out, *whole(d_out)), *bits)
    sums = jnp.sum(sums, axis=(0, 1))[:, :E]
    return dx[:, :T, :E], d_past[..., :E], sums[:K].astype(taps.dtype), sums[K].astype(bias.dtype), None


short_conv.defvjp(_forward, _backward)


def whole(x: Array) -> tuple[int, int]:
    """How many tokens and channels are added to x."""
    return -x.shape[1] % TILE, -x.shape[2] % THREADS


def padded(a: Array, tokens: int, channels: int) -> Array:
    sizes = (*a.shape[:-2], a.shape[-2] + tokens, a.shape[-1] + channels)
    return lax.pad(a, jnp.zeros((), a.dtype), [(0, n - m, 0) for n, m in zip(sizes, a.shape, strict=True)])


def _whole(x: Array, past: Array, taps: Array, bias: Array, seen: Array | None) -> list[Array]:
    """As the kernels take them: x, past, weights (members, K + 1, E), the bias behind the taps, and seen (rows, T), if
    any: bit j of a token says whether it sees what tap j reaches."""
    tokens, channels = whole(x)
    weights = jnp.concatenate([taps.astype(F32), bias.astype(F32)[None]])[None]
    arrays = [padded(x, tokens, channels), padded(past, 0, channels), padded(weights, 0, channels)]
    if seen is None:
        return arrays
    bits = jnp.int32(1) << jnp.arange(len(taps) - 1)
    return [*arrays, jnp.pad(jnp.sum(jnp.where(seen, bits[:, None], 0), axis=1), ((0, 0), (0, tokens)))]


def block_of(E: int) -> tuple[int, Any]:
    """(channels of a warpgroup, how they lie over its threads)."""
    block = 2 * THREADS if E % (2 * THREADS) == 0 else THREADS
    return block, plgpu.Layout.WG_STRIDED((block,), vec_size=block // THREADS)


def reader(layout: Any) -> Any:
    return lambda ref: compat.gpu_load(ref, layout).astype(F32)


def visible(a: Array, sees: Any, j: int, K: int) -> Array:
    """a where a token sees what tap j reaches; `sees`: its bits; None: all."""
    return a if sees is None or j == K - 1 else a * jnp.where(sees & (1 << j) != 0, 1.0, 0.0)


def sums_of(window: list[Array], taps: list[Array], bias: Array, sees: Any) -> tuple[Array, Array]:
    """(y, sigmoid(y)) of a token's window, the oldest first."""
    K = len(taps)
    y = bias + sum(taps[j] * visible(window[j], sees, j, K) for j in range(K))
    root = lax.rsqrt(1.0 + jnp.exp2(y * -math.log2(math.e)))
    return y, root * root  # a quotient would be exact, in ten instructions


def _values(x: Array, past: Array, weights: Array, *seen: Array) -> Array:
    """silu of the sums."""
    (rows, T, E), K = x.shape, weights.shape[1] - 1
    members = rows // weights.shape[0]
    block, layout = block_of(E)
    read = reader(layout)

    def kernel(x_g: Any, past_g: Any, weights_g: Any, *refs: Any) -> None:
        seen_g, (y_g, x_s, arrived, *seen_s) = refs[: len(seen)], refs[len(seen) :]
        row, span = lax.axis_index("row"), lax.axis_index("span")
        mine = pl.ds(lax.axis_index("block") * block, block)
        start = span * SPAN
        tiles = lax.div(jnp.minimum(start + SPAN, T) - start, jnp.int32(TILE))

        def tokens(i: Any) -> Any:
            return pl.ds(start + i * TILE, TILE)

        def fetch(i: Any) -> None:
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.copy_gmem_to_smem(x_g.at[row, tokens(i), mine], x_s.at[slot], arrived.at[slot])
            for g, s in zip(seen_g, seen_s, strict=True):
                plgpu.copy_gmem_to_smem(g.at[row, tokens(i)], s.at[slot, pl.ds(0, TILE)], arrived.at[slot])

        for i in range(SLOTS - 1):
            pl.when(i < tiles)(partial(fetch, jnp.int32(i)))

        *taps, bias = (read(weights_g.at[lax.div(row, jnp.int32(members)), j, mine]) for j in range(K + 1))

        def before(g: Any, first: Any) -> list[Array]:
            return [read(g.at[row, first + j, mine]) for j in range(K - 1)]

        def one_tile(i: Any, window: list[Array]) -> list[Array]:
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.barrier_wait(arrived.at[slot])
            for t in range(TILE):
                window = [*window, read(x_s.at[slot, t])]
                y, sigmoid = sums_of(window, taps, bias, seen_s[0][slot, t] if seen else None)
                x_s[slot, t] = (y * sigmoid).astype(x.dtype)
                window = window[1:]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_s.at[slot], y_g.at[row, tokens(i), mine])

            @pl.when(i + SLOTS - 1 < tiles)
            def _() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for all but the copy that has just begun
                fetch(i + SLOTS - 1)

            return window

        window = lax.cond(start > 0, lambda: before(x_g, start - K + 1), lambda: before(past_g, jnp.int32(0)))
        lax.fori_loop(0, tiles, one_tile, window)
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[
            plgpu.SMEM((SLOTS, TILE, block), x.dtype),
            plgpu.Barrier(num_arrivals=1 + len(seen), num_barriers=SLOTS),
            *(plgpu.SMEM((SLOTS, ALIGNED // 4), jnp.int32) for _ in seen),
        ],
        grid=(rows, -(-T // SPAN), E // block),
        grid_names=("row", "span", "block"),
        kernel_name="short_conv_forward",
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # Threads read and write what is theirs; the copy out comes after `commit_smem`, which is a barrier.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return run(x, past, weights, *seen)


def _gradients(x: Array, past: Array, weights: Array, d_out: Array, *seen: Array) -> Any:
    """dx, d past, and of every span of tokens the gradients of taps and bias (rows, spans, K + 1, E)."""
    (rows, T, E), K = x.shape, weights.shape[1] - 1
    members, spans = rows // weights.shape[0], -(-T // SPAN)
    block, layout = block_of(E)
    read = reader(layout)
    group = 2 if seen else TILE  # with more of them, what documents mask takes 133 registers

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

        for i in range(SLOTS - 1):
            pl.when(i < tiles)(partial(fetch, jnp.int32(i)))

        *taps, bias = (read(weights_g.at[lax.div(row, jnp.int32(members)), j, mine]) for j in range(K + 1))

        def token(carry: Any, oldest: Array, d_out: Array, sees: Any) -> tuple[Array, Any]:
            """dx of a token. The carry: the other tokens of its window, what dx of those before it and its own has so
            far, and the sums. `sees`: the token's bits; None: all."""
            others, begun, sums = carry
            window = [oldest, *others]
            y, sigmoid = sums_of(window, taps, bias, sees)
            d_y = d_out * (sigmoid * (1.0 + y * (1.0 - sigmoid)))
            to = [visible(d_y, sees, j, K) for j in range(K)]
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
