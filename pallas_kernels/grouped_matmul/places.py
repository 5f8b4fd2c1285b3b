"""Rows to the places of a layout and back.

What a gather moves, its gradient moves back by the opposite gather: a scatter, which autodiff would make of it, is slow
on CPUs and of no fixed order on accelerators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.xla import F32, no_gradient
from pallas_kernels.grouped_matmul.xla import gather as gather_rows

Gather = Callable[[Array, Array], Array]  # (x, index) -> x[index], zero where that is beyond the end


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(
    gather: Gather, x: Float[Array, "n D"], source: Int[Array, "N t"], place: Int[Array, " M"]
) -> Float[Array, "N t D"]:
    copies = place.size // x.shape[0]
    return gather(x, source // copies)  # `source` M: row n, beyond the end


def _spread_forward(gather: Gather, x: Array, source: Array, place: Array) -> tuple[Array, Any]:
    return spread(gather, x, source, place), (x.shape[0], source, place)


def _spread_backward(gather: Gather, kept: Any, dy: Array) -> tuple[Array, Any, Any]:
    n, source, place = kept
    return _sums(dy, place, n).astype(dy.dtype), no_gradient(source), no_gradient(place)


spread.defvjp(_spread_forward, _spread_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def collect(
    gather: Gather, y: Float[Array, "N t D"], source: Int[Array, "N t"], place: Int[Array, " M"], copies: int
) -> Float[Array, "n D"]:
    return _sums(y, place, place.size // copies)


def _collect_forward(gather: Gather, y: Array, source: Array, place: Array, copies: int) -> tuple[Array, Any]:
    return collect(gather, y, source, place, copies), (jnp.zeros((), y.dtype), source, place)


def _collect_backward(gather: Gather, copies: int, kept: Any, d: Array) -> tuple[Any, Any, Any]:
    like, source, place = kept
    dy = spread(gather, d.astype(like.dtype), source, place)
    return dy, no_gradient(source), no_gradient(place)


collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def spread_numbers(w: Float[Array, " M"], source: Int[Array, "N t"], place: Int[Array, " M"]) -> Float[Array, "N t"]:
    return gather_rows(w, source)


def _numbers_forward(w: Array, source: Array, place: Array) -> tuple[Array, Any]:
    return spread_numbers(w, source, place), (source, place)


def _numbers_backward(kept: Any, d: Array) -> tuple[Array, Any, Any]:
    source, place = kept
    return gather_rows(d.reshape(-1), place), no_gradient(source), no_gradient(place)


spread_numbers.defvjp(_numbers_forward, _numbers_backward)


def _sums(y: Array, place: Array, n: int) -> Array:
    """Of the rows at every n-th part of `place`, in float32; nowhere is zero."""
    rows = gather_rows(y.reshape(-1, y.shape[-1]), place)
    return jnp.sum(rows.reshape(n, -1, y.shape[-1]), axis=1, dtype=F32)
