"""What each tensor is, and what follows from it: how it starts, how fast it learns and whether it decays.

A part of a model declares its tensors once, as `Tensor`s. Parameters, counts, roles, initial values, multipliers and
the decay mask all come from that declaration, so they cannot disagree.

Roles: `embedding`; `unembedding`; `hidden` (fan-in and fan-out both grow with the width); `gate` (fan-in grows,
fan-out fixed: routers, input and forget gates); `vector` (gains, biases, convolution taps, learned prefixes); `buffer`
(no parameter, but what a layer keeps beside them: constants of its depth, the selection bias of a router).

muP (Yang et al. 2022, arXiv 2203.03466) and CompleteP (Dey et al. 2025, arXiv 2505.01618) carry a learning rate eta, a
decay lambda, an initialisation and an Adam eps that were tuned at a base width and depth over to other ones. With m_N =
D / D_base, m_L = L / L_base (1 under muP), m a matrix's own fan-in over that of its copy in the base model, alpha = 1:

                                    start, variance     learning rate           weight decay
    hidden, gate                    base / m            eta / m m_L^(alpha-1)   lambda m^p
    vector, in blocks (outside)     as published        eta m_L^(alpha-1) (eta) 0
    embedding, unembedding          base                eta                     lambda or 0

    Adam's eps: eps / m_N, in blocks times m_L^-alpha    attention scores: q k sqrt(d_base) / d
    residual branches: x + m_L^-alpha f(x)               logits: a_out x W / m_N;  embedding output: a_in x

"base" is the value that `model.init`, or the tensor's own `start`, gives in the base model: there is no 1 / sqrt(2 L)
of the actual depth in it, and in a model of the base's shape every rule gives what `standard` does. Decay multiplies
the learning rate; p = 1 (`optim.decay_exponent`) keeps eta lambda (the table of CompleteP), p = 1/2 a matrix's gain
(arXiv 2510.15262), p = 0 lambda. A tied embedding is an embedding.

Choices, where the papers, which have Transformers, are silent: everything but attention and MLP goes by its own fan-in,
m above, gates and routers too. So maps inside blocks or heads of a fixed width have m = 1: block-diagonal q, k, v of
mLSTM, the maps of sLSTM with heads of one width, GLA's second decay matrix; those of sLSTM and the experts' outputs
scale where heads or experts widen. Vectors start as without muP. The queries of linear attention and of mLSTM keep
their 1 / sqrt(d): what they read is normed, so the scale has no effect, or little (mLSTM's normaliser has a floor). eps
of the final norm is that of the embedding.
Experimental: that these rules keep selective recurrences and experts of another granularity stable is not established;
`scalelab bench coords` is the check.
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
PARAMETRIZATIONS = ("standard", "mup", "completep")
ALPHA = 1  # CompleteP's depth exponent


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter: `shape`, what it is (`role`), how wide a sum each of its outputs is (`fan_in`), whether it writes
    to the residual stream (`residual`), and the constant that a vector starts at (`fill`). `start` is an initialisation
    of its own: a function of standard normal numbers and of the layer's place in the stack (`Depth`). A hidden matrix
    is read in the compute dtype, with `exact` in float32."""

    shape: tuple[int, ...]
    role: str
    fan_in: int = 1
    residual: bool = False
    fill: float = 0.0
    active: int | None = None  # elements that one token uses, where not all (experts)
    start: Start | None = None
    exact: bool = False
    base: Tensor | None = None  # what it is in the base model, under muP and CompleteP

    @property
    def matrix(self) -> bool:
        return self.role in ("hidden", "gate")

    @property
    def growth(self) -> float:
        """m of a matrix."""
        return self.fan_in / self.base.fan_in if self.matrix and self.base is not None else 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def active_size(self) -> int:
        return self.size if self.active is None else self.active

    @property
    def random(self) -> bool:
        return self.start is not None or self.role not in ("vector", "buffer")


def with_base(tensors: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: dataclasses.replace(tensor, base=base[name]) for name, tensor in tensors.items()}


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
    """How matrices start.

    normal: N(0, std^2), residual outputs std / sqrt(branches) (GPT-2). small: N(0, 2 / (5 D)), residual outputs
    N(0, (2 / (branches sqrt(D)))^2) (Nguyen & Salazar 2019; Wang & Komatsuzaki 2021, as in GPT-NeoX). fan_in:
    N(0, 1 / fan_in). `branches` is the number of residual branches, 2 L for attention + MLP.

    Under muP and CompleteP `width` and `branches` are those of the base model and `base_layers` its depth, and the
    variance of what starts there so is divided by m.
    """

    kind: str
    std: float
    width: int
    branches: float
    layers: int = 1
    base_layers: int | None = None

    def std_of(self, tensor: Tensor) -> float:
        return self._base_std(tensor.base or tensor) / math.sqrt(tensor.growth)

    def _base_std(self, tensor: Tensor) -> float:
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
            if tensor.matrix and tensor.base is not None and tensor.base.start is not None:
                values = tensor.base.start(z, Depth(layer, self.base_layers or self.layers))
                return values.astype(jnp.float32) / math.sqrt(tensor.growth)
            return tensor.start(z, Depth(layer, self.layers)).astype(jnp.float32)

        return draw


@dataclasses.dataclass(frozen=True)
class Rule:
    """What multiplies the learning rate, the weight decay and Adam's eps of a tensor."""

    lr: float
    decay: float
    eps: float


def rule(tensor: Tensor, width: float, depth: float, in_block: bool, decay_exponent: float) -> Rule:
    """Of a tensor of a model with m_N = `width`, m_L = `depth` (1 under muP), inside or outside of its blocks."""
    lr = depth ** (ALPHA - 1) if in_block else 1.0
    eps = (depth**-ALPHA if in_block else 1.0) / width
    if tensor.role in ("hidden", "gate"):
        return Rule(lr / tensor.growth, tensor.growth**decay_exponent, eps)
    if tensor.role in ("vector", "embedding", "unembedding"):
        return Rule(lr, 1.0, eps)
    if tensor.role == "buffer":
        return Rule(0.0, 0.0, 1.0)
    raise ValueError(f"no rule for the role {tensor.role!r}")


def decay_mask(roles: Any, decay_embeddings: bool) -> Any:
    """Tree of roles -> tree of bool: which tensors weight decay applies to. Vectors never; embeddings if asked."""
    decays = {
        "hidden": True, "gate": True, "unembedding": True, "vector": False, "buffer": False,
        "embedding": decay_embeddings,
    }  # fmt: skip
    return jax.tree.map(lambda role: decays[role], roles)
