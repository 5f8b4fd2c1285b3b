"""What is left of a chunked recurrence when all that needs no state is done: a walk over the chunks.

Per head and chunk, with A the weights between its tokens and c what each row of the state keeps of itself,

    x = values + erase S;  out = read S + A x;  S <- c S + write^T x

`erase` may be missing. Given the gradient of out, the gradient D of the state walks from the last chunk to the first in
the same way, read and write exchanged and A transposed, but that erase comes last:

    dx = write D + A^T dout;  D <- c D + read^T dout + erase^T dx

so one kernel does both, one for Hopper (`gpu`) and one for TPUs (`tpu`). It stores the states that it meets; the other
gradients are products of what both walks left, one for each chunk. The state is float32, and is rounded only as the
operand of products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.population import folded

F32 = jnp.float32
Arrays = dict[str, Array]


class Form(NamedTuple):
    """A device's walk: of the arrays that `recurrence` takes, by name, `erase` only where there is one. It returns out
    (B, C, H, L, V) and final (B, H, K, V), the state after it; if it is to `keep` them, states (B, C, H, K, V) as they
    are met, and x where it is not the values. All but final are in the dtype of `read`. In `reverse` it goes from the
    last chunk, the weights transposed, `erase` upon out."""

    walk: Callable[[Arrays, bool, bool], Arrays]  # arrays, reverse, keep
    L: int  # tokens of a chunk
    unit: int  # the walk takes widths that are multiples of it

    def sweep(self, *arrays: Array | None, reverse: bool = False, keep: bool = False) -> Arrays:
        """The walk, of a population too."""
        names = ("read", "write", "erase", "values", "weights", "carried", "state")
        named = {name: a for name, a in zip(names, arrays, strict=True) if a is not None}
        return folded(lambda named: self.walk(named, reverse, keep))(named)


def recurrence(
    form: Form,
    read: Float[Array, "B C H L K"],
    write: Float[Array, "B C H L K"],
    erase: Float[Array, "B C H L K"] | None,
    values: Float[Array, "B C H L V"],
    weights: Float[Array, "B C H L L"],
    carried: Float[Array, "B C H K"],
    state: Float[Array, "B H K V"] | None,
    tokens: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """(out in the dtype of `read`, of so many tokens; the last state). `values` are float32 where there is `erase`;
    `carried` and the states are always, the rest is in one dtype that the form takes."""
    (B, _, H, _, V), K = values.shape, read.shape[-1]
    state = jnp.zeros((B, H, K, V), F32) if state is None else state.astype(F32)

    def whole(a: Array | None, *axes: int) -> Any:
        if a is None:
            return None
        # zeros in keys and values add nothing
        return jnp.pad(a, [(0, -n % form.unit if i - a.ndim in axes else 0) for i, n in enumerate(a.shape)])

    keys = (whole(a, -1) for a in (read, write, erase))
    walked: Any = _walk(form, *keys, whole(values, -1), weights, whole(carried, -1), whole(state, -2, -1))
    out, final = walked[0][..., :V], walked[1][:, :, :K, :V]
    return jnp.moveaxis(out, 2, 3).reshape(B, -1, H, V)[:, :tokens], final


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(form: Form, *arrays: Any) -> Any:
    swept = form.sweep(*arrays)
    return swept["out"], swept["final"]


def _forward(form: Form, read: Any, write: Any, erase: Any, values: Any, weights: Any, carried: Any, state: Any) -> Any:
    swept = form.sweep(read, write, erase, values, weights, carried, state, keep=True)
    x = values if erase is None else swept["x"]
    return (swept["out"], swept["final"]), (read, write, erase, x, weights, carried, swept["states"])


def _backward(form: Form, kept: Any, cotangents: Any) -> Any:
    (read, write, erase, x, weights, carried, S), (d_out, d_final) = kept, cotangents
    swept = form.sweep(write, read, erase, d_out, weights, carried, d_final, reverse=True, keep=True)
    d_x, D, d_state = swept["out"], swept["states"], swept["final"]

    def product(equation: str, a: Array, b: Array) -> Array:
        # float32 is asked for by dtype, whatever the setting for products elsewhere, as in the walk
        precision = lax.Precision.HIGHEST if a.dtype == F32 else None
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=F32).astype(a.dtype)

    d_read, d_write = (product("bchtv,bchkv->bchtk", a, b) for a, b in ((d_out, S), (x, D)))
    d_erase = None if erase is None else product("bchtv,bchkv->bchtk", d_x, S)
    d_weights = product("bchtv,bchsv->bchts", d_out, x)
    d_carried = jnp.sum(S.astype(F32) * D.astype(F32), axis=-1)
    return d_read, d_write, d_erase, d_x if erase is None else d_x.astype(F32), d_weights, d_carried, d_state


_walk.defvjp(_forward, _backward)
