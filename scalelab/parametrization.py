"""What each tensor is, and what follows from it: how it starts and whether it decays.

A part of a model declares its tensors once, as `Tensor`s. Parameters, counts, roles, initial values and the decay mask
all come from that declaration, so they cannot disagree.

Roles: `embedding`; `unembedding`; `hidden` (fan-in and fan-out both grow with the width); `gate` (fan-in grows,
fan-out fixed: routers, input and forget gates); `vector` (gains, biases, convolution taps, learned prefixes); `buffer`
(no parameter, but what a layer keeps beside them: constants of its depth, the selection bias of a router).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

ROLES = ("embedding", "unembedding", "hidden", "gate", "vector", "buffer")
INITS = ("normal", "small", "fan_in")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter: `shape`, what it is (`role`), how wide a sum each of its outputs is (`fan_in`), whether it writes
    to the residual stream (`residual`), and the constant that a vector starts at (`fill`). `start` is an initialisation
    of its own: a function of standard normal numbers and of the layer's place in the stack (`Depth`)."""

    shape: tuple[int, ...]
    role: str
    fan_in: int = 1
    residual: bool = False
    fill: float = 0.0
    active: int | None = None  # elements that one token uses, where not all (experts)
    start: Start | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def active_size(self) -> int:
        return self.size if self.active is None else self.active

    @property
    def random(self) -> bool:
        return self.start is not None or self.role not in ("vector", "buffer")


class Depth(NamedTuple):
    """Which layers: `layer` counts from 0, in an array of shape (*lead, 1, ...) that broadcasts against the tensor's
    values; `layers` is how many the stack has."""

    layer: Array
    layers: int


# (standard normal numbers of the tensor's shape behind `lead`, depth) -> its values.
Start = Callable[[Array, Depth], Array]
# (tensor, axes in front that hold independent copies: the layers of a scanned stack, numbers of those layers) -> values
Source = Callable[..., Array]


def uniform(bound: float) -> Start:
    """U(-bound, bound): torch's default for linear maps and convolutions, with bound = 1 / sqrt(fan-in)."""
    return lambda z, depth: bound * jax.scipy.special.erf(z / math.sqrt(2))


def between(low: float, high: float) -> Start:
    """U(low, high)."""
    return lambda z, depth: low + (high - low) * 0.5 * (1 + jax.scipy.special.erf(z / math.sqrt(2)))


def constant(values: Any) -> Start:
    """The same values in every layer."""
    return lambda z, depth: jnp.broadcast_to(values, z.shape)


@dataclasses.dataclass(frozen=True)
class Init:
    """How matrices start (standard parametrisation).

    normal: N(0, std^2), residual outputs std / sqrt(branches) (GPT-2). small: N(0, 2 / (5 D)), residual outputs
    N(0, (2 / (branches sqrt(D)))^2) (Nguyen & Salazar 2019; Wang & Komatsuzaki 2021, as in GPT-NeoX). fan_in:
    N(0, 1 / fan_in). `branches` is the number of residual branches, 2 L for attention + MLP.
    """

    kind: str
    std: float
    width: int
    branches: int
    layers: int = 1

    def std_of(self, tensor: Tensor) -> float:
        if self.kind == "normal":
            return self.std / math.sqrt(self.branches) if tensor.residual else self.std
        if self.kind == "small":
            return 2 / (self.branches * math.sqrt(self.width)) if tensor.residual else math.sqrt(2 / (5 * self.width))
        return 1 / math.sqrt(tensor.fan_in)

    def source(self, key: jax.Array, size: int) -> Source:
        """Draws the matrices of a model, `size` elements in all, in the order in which it is asked.

        The numbers come from one array for all: to compile a generator for every shape takes seconds a model.
        """
        normal, used = jax.random.normal(key, (size,), jnp.float32), 0

        def draw(tensor: Tensor, lead: tuple[int, ...] = (), layer: Array | int = 0) -> Array:
            nonlocal used
            shape = (*lead, *tensor.shape)
            if not tensor.random:
                return jnp.full(shape, tensor.fill, jnp.float32)
            start, used = used, used + math.prod(shape)
            assert used <= size, (used, size)
            z = normal[start:used].reshape(shape)
            if tensor.start is None:
                return self.std_of(tensor) * z
            layer = jnp.asarray(layer, jnp.float32).reshape(*lead, *(1,) * len(tensor.shape))
            return tensor.start(z, Depth(layer, self.layers)).astype(jnp.float32)

        return draw


def decay_mask(roles: Any, decay_embeddings: bool) -> Any:
    """Tree of roles -> tree of bool: which tensors weight decay applies to. Vectors never; embeddings if asked."""
    decays = {
        "hidden": True, "gate": True, "unembedding": True, "vector": False, "buffer": False,
        "embedding": decay_embeddings,
    }  # fmt: skip
    return jax.tree.map(lambda role: decays[role], roles)
