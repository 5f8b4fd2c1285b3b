"""A law's formula under JAX: the NumPy functions that it calls are handed on to JAX by name.

Formulas are plain NumPy (see `jet.py`). JAX's tracers refuse NumPy's functions; wrapped in `Traced` they take them, so
that the one formula of a form can be compiled and differentiated there too. JAX is imported on first use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# what comes of a formula that looks at values (`if`, `while`, np.asarray), or calls a function that JAX lacks
UNTRACEABLE = (TypeError, AttributeError, ValueError)


class Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """A JAX array on which NumPy's functions act; raises one of `UNTRACEABLE` where it cannot."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def __bool__(self) -> bool:
        return bool(self.value)

    def __getitem__(self, key: Any) -> Traced:
        return Traced(self.value[key])

    def sum(self, axis: Any = None, keepdims: bool = False) -> Traced:
        return Traced(self.value.sum(axis=axis, keepdims=keepdims))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        import jax.numpy as jnp

        function = getattr(jnp, ufunc.__name__)
        if method != "__call__":
            function = getattr(function, method)
        return Traced(function(*map(_plain, inputs), **kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        import jax.numpy as jnp

        return Traced(getattr(jnp, func.__name__)(*_plain(args), **_plain(kwargs)))


def _plain(x: Any) -> Any:
    """Without wrappers, in containers too."""
    if isinstance(x, Traced):
        return x.value
    if isinstance(x, tuple | list):
        return type(x)(_plain(v) for v in x)
    return {k: _plain(v) for k, v in x.items()} if isinstance(x, dict) else x
