"""Tokens cut into chunks of Q, as the plain forms of the recurrences have them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def chunked(a: Shaped[Array, "B T *n"], Q: int, fill: float = 0.0) -> Shaped[Array, "B C Q *n"]:
    """C = ceil(T / Q) chunks, the last one filled up."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % Q), *((0, 0),) * (a.ndim - 2)), constant_values=fill)
    return a.reshape(a.shape[0], -1, Q, *a.shape[2:])


def by_head(a: Shaped[Array, "B T H *n"], Q: int) -> Shaped[Array, "B C H Q *n"]:
    """Zeros at the end: where all is 0, a token neither decays a state nor adds to it."""
    return jnp.moveaxis(chunked(a, Q), 3, 2)


def per_head(a: Float[Array, "B C G *n"], H: int) -> Float[Array, "B C H *n"]:
    """Of each group for its H / G heads."""
    G = a.shape[2]
    return a if G == H else jnp.repeat(a, H // G, axis=2)


def documents(reset: Shaped[Array, "B T"], Q: int) -> Int[Array, "B C 1 Q"]:
    """Numbered inside each chunk; 0 began before it."""
    return jnp.cumsum(chunked(reset, Q), axis=2)[:, :, None]
