"""Products of rows with the matrix of the group each belongs to: the experts of a mixture.

Rows are laid out in tiles of equal height, each of one group: groups begin at a multiple of the height, and what is
left of a group's last tile is zero. So a tile is one ordinary matrix product, whatever the groups' sizes
(`grouped_matmul`). Rows may also be adjacent, without tiles (`ragged_matmul`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch
from pallas_kernels.grouped_matmul import places, reference, swiglu, tpu, xla

KERNELS = ("mosaic_gpu", "mosaic_tpu")
KERNEL_TILE = 128  # the height of tiles that they take
RUN = 32  # rows that `ranks` compares with one another


class Layout(NamedTuple):
    """Where M rows go in N tiles of t, in the order of their groups."""

    source: Int[Array, "N t"]  # the row at each place; M: none
    place: Int[Array, " M"]  # the place of each row, tiles flattened; N t: nowhere
    group: Int[Array, " N"]  # of each tile; beyond the last used one: the number of groups, and the tile is zero


def tiles(rows: int, groups: int, tile: int) -> int:
    """N that suffices whatever the groups' sizes: sum of ceil(size / tile) at its largest."""
    return (rows + min(rows, groups) * (tile - 1)) // tile


def tile_height(rows: int, groups: int, form: str = "xla") -> int:
    """For the plain form the power of two whose tiles take least time, where to fetch a tile's matrix costs as much as
    12 more rows; kernels skip what is left over."""
    if form in KERNELS:
        return KERNEL_TILE
    return min((2**i for i in range(9)), key=lambda t: tiles(rows, groups, t) * (t + 12))


def padded_rows(rows: int, groups: int) -> int:
    """N t at the height that `tile_height` chooses: rows of the products as the plain form runs them."""
    tile = tile_height(rows, groups)
    return tiles(rows, groups, tile) * tile


def ranks(group: Int[Array, " M"], groups: int) -> tuple[Int[Array, " M"], Int[Array, " groups"]]:
    """(how many earlier rows each row's group has, size of each group). Rows of group `groups` are in none; what is
    said of them means nothing."""
    # Rows are compared in runs, in front of which every group is counted: no sort, and no scatter.
    runs = jnp.pad(group, (0, -group.size % RUN), constant_values=groups).reshape(-1, RUN)
    earlier = jnp.arange(RUN)[:, None] > jnp.arange(RUN)
    inside = jnp.sum((runs[:, :, None] == runs[:, None]) & earlier, axis=2, dtype=jnp.int32)
    counts = jnp.sum(runs[..., None] == jnp.arange(groups), axis=1, dtype=jnp.int32)
    until = jnp.cumsum(counts, axis=0)
    before = jnp.take_along_axis(until - counts, runs, axis=1, mode="fill", fill_value=0)
    return (inside + before).reshape(-1)[: group.size], jnp.sum(counts, axis=0)


def layout(group: Int[Array, " M"], groups: int, tile: int = 0) -> Layout:
    """The tiles of rows with a group each, 0 to groups - 1; rows of group `groups` go nowhere. Rows of a group keep
    their order. Any sizes: empty groups take no tile, one group may have all rows."""
    M = group.size
    tile = tile or tile_height(M, groups)
    N = tiles(M, groups, tile)
    rank, sizes = ranks(group, groups)
    ends = jnp.cumsum(-(-sizes // tile))
    start = jnp.append(0, ends[:-1]) * tile
    place = jnp.where(group < groups, jnp.append(start, 0)[group] + rank, N * tile)
    source = jnp.full((N * tile,), M, jnp.int32).at[place].set(jnp.arange(M), mode="drop")
    return Layout(source.reshape(N, tile), place, jnp.sum(ends <= jnp.arange(N)[:, None], axis=1, dtype=jnp.int32))


def spread(x: Float[Array, "n D"], plan: Layout, form: str = "xla") -> Float[Array, "N t D"]:
    """Rows to their places: of the layout's M = n k rows, number i is a copy of x[i // k]; what is left over of the
    tiles is zero. Both directions, values and gradients, are gathers. `form`: what `choose` says."""
    return places.spread(_gather(form, x), x, plan.source, plan.place)


def spread_numbers(w: Float[Array, " M"], plan: Layout) -> Float[Array, "N t"]:
    """A number of each row to the row's place; zero where there is no row."""
    return places.spread_numbers(w, plan.source, plan.place)


def collect(y: Float[Array, "N t D"], plan: Layout, copies: int = 1, form: str = "xla") -> Float[Array, "n D"]:
    """Rows from their places, the sum of every `copies` that follow one another, in float32; what went nowhere counts
    zero."""
    return places.collect(_gather(form, y), y, plan.source, plan.place, copies)


def weighted_swiglu(both: Float[Array, "*b 2*F"], w: Float[Array, "*b"], form: str = "xla") -> Float[Array, "*b F"]:
    """w silu(gate) up of (gate, up) = both, in float32, rounded once to both's dtype; differentiable in both and w. The
    router's weight before the last product and not behind it, where its gradient would take sums over wider rows.

    FLOPs: about 7 a number of the result, 15 backwards. Memory between the passes: the arguments alone.
    """
    return swiglu.weighted_swiglu(_gate_gradients(form, both), both, w)


def _gate_gradients(form: str, both: Array) -> swiglu.Gradients:
    if form == "mosaic_gpu":
        from pallas_kernels.grouped_matmul import gpu_swiglu  # brings Mosaic GPU

        if gpu_swiglu.fits(both):
            return gpu_swiglu.gradients
    return swiglu.gradients


def _gather(form: str, x: Array) -> places.Gather:
    if form == "mosaic_gpu" and x.dtype == jnp.bfloat16:
        from pallas_kernels.grouped_matmul import gpu_rows  # brings Mosaic GPU

        return gpu_rows.gather
    return xla.gather


def grouped_matmul(
    x: Float[Array, "N t D"], w: Float[Array, "G D F"], group: Int[Array, " N"], *, kernels: str = "auto"
) -> Float[Array, "N t F"]:
    """y_n = x_n w[group_n], in x's dtype, accumulated in float32; differentiable in x and w. Tiles as `layout` makes
    them: in the order of their groups. Tiles of group G must be zero.

    FLOPs: 2 N t D F, padding included (`padded_rows`); the kernels for GPUs skip tiles of group G. Bytes of the
    weights: D F a tile. The gradient of w is summed over tiles in float32.
    Raises `ValueError` for `kernels` of no form; `dispatch.Unsupported`, which is one too, where the form that
    `kernels` names does not take the arguments.
    Source: the tiles are those of block-sparse products (Gale et al. 2022, arXiv 2211.15841), aligned to groups.
    """
    return _form(choose(x, w, kernels)).grouped_matmul(x, w, group)


def ragged_matmul(
    x: Float[Array, "M D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, kernels: str = "auto"
) -> Float[Array, "M F"]:
    """y_r = x_r w[g] for the sizes[0] first rows with g = 0, the sizes[1] next ones with g = 1, ...; in x's dtype,
    accumulated in float32; differentiable in x and w. Any sizes, also zero, whose sum is at most M: rows past it give
    zero, and so do their gradients; an empty group's matrix has the gradient zero.

    FLOPs: 2 D F a row; on GPUs those of a tile of rows once for each group that it has rows of. Plain JAX moves the
    rows to tiles and back.
    Raises `ValueError` for `kernels` of no form; `dispatch.Unsupported`, which is one too, where the form that
    `kernels` names does not take the arguments.
    Source: as `grouped_matmul`.
    """
    form = choose(x, w, kernels)
    if form != "xla":
        return _form(form).ragged_matmul(x, w, sizes)
    group = jnp.sum(jnp.arange(x.shape[0])[:, None] >= jnp.cumsum(sizes), axis=1)
    plan = layout(group, w.shape[0])
    return collect(xla.grouped_matmul(spread(x, plan), w, plan.group), plan).astype(x.dtype)


def choose(x: Array, w: Array, kernels: str = "auto") -> str:
    """The implementation that runs for rows like x (..., D) with w (G, D, F), to be named in the calls. Raises as
    `dispatch.explain`."""

    def refusal(name: str) -> str:
        if name == "mosaic_gpu" and (reason := compat.without_mosaic_gpu()):
            return reason
        return _form(name).refusal(x, w)

    return dispatch.choose("grouped_matmul", kernels, {name: partial(refusal, name) for name in KERNELS})


def _form(name: str) -> Any:
    if name == "mosaic_gpu":
        from pallas_kernels.grouped_matmul import gpu  # brings Mosaic GPU

        return gpu
    return {"xla": xla, "mosaic_tpu": tpu, "reference": reference}[name]
