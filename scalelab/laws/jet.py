"""Second derivatives of a law in its parameters: forward mode, exact, in NumPy, without a compiler.

A `Jet` is an array with its gradient and Hessian in P scalars that vary along the first axis (the solver's lanes).
Only entries that are not zero are kept: a law is mostly a sum of terms in few parameters each, so most of the Hessian
never comes into being. Laws are plain NumPy functions; given jets instead of arrays they return jets. A first fit
therefore costs milliseconds, where tracing and compiling the same derivatives costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Gradient = dict[int, np.ndarray]
Hessian = dict[tuple[int, int], np.ndarray]  # (i, j) with i <= j


class Jet(np.lib.mixins.NDArrayOperatorsMixin):
    """value, {i: d/du_i}, {(i, j): d2/du_i du_j, i <= j}; arrays that broadcast against each other."""

    __slots__ = ("gradient", "hessian", "value")

    def __init__(self, value: np.ndarray, gradient: Gradient, hessian: Hessian):
        self.value, self.gradient, self.hessian = value, gradient, hessian

    @classmethod
    def variable(cls, value: np.ndarray, index: int) -> Jet:
        return cls(value, {index: np.ones((1,) * np.ndim(value))}, {})

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    @property
    def ndim(self) -> int:
        return np.ndim(self.value)

    def __repr__(self) -> str:
        return f"Jet({self.value!r}, in {sorted(self.gradient)})"

    def __getitem__(self, key: Any) -> Jet:
        return self.map_linear(lambda a: np.broadcast_to(a, self.shape)[key])

    def sum(self, axis: Any = None, keepdims: bool = False) -> Jet:
        return self.map_linear(lambda a: np.sum(np.broadcast_to(a, self.shape), axis=axis, keepdims=keepdims))

    def map_linear(self, f: Callable[[np.ndarray], np.ndarray]) -> Jet:
        """Any linear map of the array, entry by entry."""
        return Jet(
            f(self.value), {i: f(g) for i, g in self.gradient.items()}, {k: f(h) for k, h in self.hessian.items()}
        )

    def chain(self, value: np.ndarray, first: np.ndarray, second: np.ndarray | None) -> Jet:
        """phi(self) from phi, phi' and phi'' (None: zero)."""
        gradient = {i: first * g for i, g in self.gradient.items()}
        hessian = {k: first * h for k, h in self.hessian.items()}
        if second is not None:
            items = sorted(self.gradient.items())
            for n, (i, gi) in enumerate(items):
                bent = second * gi
                for j, gj in items[n:]:
                    _accumulate(hessian, (i, j), bent * gj)
        return Jet(value, gradient, hessian)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "reduce" and ufunc is np.add:
            return inputs[0].sum(axis=kwargs.get("axis", 0), keepdims=kwargs.get("keepdims", False))
        if method != "__call__" or kwargs:
            return NotImplemented
        if ufunc is np.negative:
            return _negative(inputs[0])
        if ufunc in UNARY:
            (x,) = inputs
            return x.chain(*UNARY[ufunc](x.value))
        if ufunc in BINARY:
            return BINARY[ufunc](*inputs)
        if ufunc in COMPARISONS:
            return ufunc(*(value_of(x) for x in inputs))
        return NotImplemented

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in FUNCTIONS:
            return FUNCTIONS[func](*args, **kwargs)
        return NotImplemented


def value_of(x: Any) -> Any:
    """The plain array of a jet; anything else as it is."""
    return x.value if isinstance(x, Jet) else x


def _accumulate(into: dict[Any, np.ndarray], key: Any, term: np.ndarray) -> None:
    into[key] = into[key] + term if key in into else term


def _negative(x: Jet) -> Jet:
    return x.map_linear(np.negative)


def _linear(a: Any, b: Any, sign: float) -> Jet:
    value = value_of(a) + value_of(b) if sign > 0 else value_of(a) - value_of(b)
    gradient, hessian = (dict(a.gradient), dict(a.hessian)) if isinstance(a, Jet) else ({}, {})
    if isinstance(b, Jet):
        b = b if sign > 0 else _negative(b)
        for i, g in b.gradient.items():
            _accumulate(gradient, i, g)
        for k, h in b.hessian.items():
            _accumulate(hessian, k, h)
    return Jet(value, gradient, hessian)


def _multiply(a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        return Jet(a.value * b, {i: g * b for i, g in a.gradient.items()}, {k: h * b for k, h in a.hessian.items()})
    gradient: Gradient = {}
    hessian: Hessian = {}
    for x, y in ((a, b), (b, a)):
        for i, g in x.gradient.items():
            _accumulate(gradient, i, g * y.value)
        for k, h in x.hessian.items():
            _accumulate(hessian, k, h * y.value)
    for i, gi in a.gradient.items():
        for j, gj in b.gradient.items():
            _accumulate(hessian, (min(i, j), max(i, j)), (2 if i == j else 1) * (gi * gj))
    return Jet(a.value * b.value, gradient, hessian)


def _reciprocal(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    one = 1.0 / v
    return one, -one * one, 2.0 * one * one * one


def _divide(a: Any, b: Any) -> Jet:
    return _multiply(a, b.chain(*_reciprocal(b.value)) if isinstance(b, Jet) else 1.0 / b)


def _power(a: Any, b: Any) -> Jet:
    if isinstance(b, Jet):  # a^b = exp(b ln a)
        log = np.log(a)
        x = _multiply(b, log)
        e = np.exp(x.value)
        return x.chain(e, e, e)
    v = a.value
    return a.chain(v**b, b * v ** (b - 1.0), b * (b - 1.0) * v ** (b - 2.0) if np.any(b != 1) else None)


def _select(choose_first: np.ndarray, a: Any, b: Any) -> Jet:
    """a where `choose_first`, else b: the derivative of whichever is taken."""
    a = a if isinstance(a, Jet) else Jet(np.asarray(a, float), {}, {})
    b = b if isinstance(b, Jet) else Jet(np.asarray(b, float), {}, {})
    zero = np.zeros(1)

    def pick(x: dict[Any, np.ndarray], y: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
        return {k: np.where(choose_first, x.get(k, zero), y.get(k, zero)) for k in x.keys() | y.keys()}

    value = np.where(choose_first, a.value, b.value)
    return Jet(value, pick(a.gradient, b.gradient), pick(a.hessian, b.hessian))


def _logaddexp(a: Any, b: Any) -> Jet:
    top = np.maximum(value_of(a), value_of(b))
    return np.log(np.exp(a - top) + np.exp(b - top)) + top


def _exp(v: np.ndarray) -> tuple[np.ndarray, ...]:
    e = np.exp(v)
    return e, e, e


def _log(v: np.ndarray) -> tuple[np.ndarray, ...]:
    one = 1.0 / v
    return np.log(v), one, -one * one


def _expm1(v: np.ndarray) -> tuple[np.ndarray, ...]:
    e = np.exp(v)
    return np.expm1(v), e, e


def _log1p(v: np.ndarray) -> tuple[np.ndarray, ...]:
    one = 1.0 / (1.0 + v)
    return np.log1p(v), one, -one * one


def _sqrt(v: np.ndarray) -> tuple[np.ndarray, ...]:
    root = np.sqrt(v)
    return root, 0.5 / root, -0.25 / (root * v)


def _tanh(v: np.ndarray) -> tuple[np.ndarray, ...]:
    t = np.tanh(v)
    return t, 1 - t * t, -2 * t * (1 - t * t)


def _square(v: np.ndarray) -> tuple[Any, ...]:
    return v * v, 2 * v, np.full((1,) * np.ndim(v), 2.0)


def _absolute(v: np.ndarray) -> tuple[Any, ...]:
    return np.abs(v), np.sign(v), None


def _positive(v: np.ndarray) -> tuple[Any, ...]:
    return v, np.ones((1,) * np.ndim(v)), None


LN2, LN10 = np.log(2.0), np.log(10.0)

UNARY: dict[np.ufunc, Callable[[np.ndarray], tuple[Any, ...]]] = {
    np.exp: _exp, np.log: _log, np.expm1: _expm1, np.log1p: _log1p, np.sqrt: _sqrt, np.tanh: _tanh,
    np.square: _square, np.absolute: _absolute, np.positive: _positive,
    np.reciprocal: _reciprocal,
    np.log2: lambda v: tuple(a / LN2 for a in _log(v)),
    np.log10: lambda v: tuple(a / LN10 for a in _log(v)),
}  # fmt: skip
BINARY: dict[np.ufunc, Callable[[Any, Any], Jet]] = {
    np.add: lambda a, b: _linear(a, b, 1.0),
    np.subtract: lambda a, b: _linear(a, b, -1.0),
    np.multiply: _multiply,
    np.divide: _divide,
    np.power: _power,
    np.maximum: lambda a, b: _select(value_of(a) >= value_of(b), a, b),
    np.minimum: lambda a, b: _select(value_of(a) <= value_of(b), a, b),
    np.logaddexp: _logaddexp,
}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal, np.isfinite, np.isnan}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.where: lambda test, a, b: _select(value_of(test), a, b),
    np.sum: lambda a, axis=None, keepdims=False: a.sum(axis=axis, keepdims=keepdims),
    np.clip: lambda a, low, high: np.minimum(np.maximum(a, low), high),
}
