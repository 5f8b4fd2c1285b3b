"""The dense channel mixer: SwiGLU or GEGLU with exact GELU (Shazeer 2020), or the two-matrix MLP with tanh-approximated
GELU (GPT-2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from scalelab.models.layers import linear, pointwise
from scalelab.models.part import ChannelMixer
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Tensor
from scalelab.schema import at_least, choice


@dataclasses.dataclass(frozen=True)
class MLPOptions:
    """See `schema.base`."""

    kind: str
    hidden: int
    bias: bool


class MLP(ChannelMixer):
    Options = MLPOptions
    grows = ("hidden",)
    gate: nnx.Param
    up: nnx.Param
    down: nnx.Param

    @staticmethod
    def check(options: MLPOptions, field: str, width: int) -> None:
        choice(f"{field}.kind", options.kind, ("swiglu", "gelu", "geglu"))
        at_least(f"{field}.hidden", options.hidden, 1)

    @staticmethod
    def tensors(spec: Spec, options: MLPOptions) -> dict[str, Tensor]:
        D, F = spec.width, options.hidden
        inward = ("up",) if options.kind == "gelu" else ("gate", "up")
        tensors = {name: Tensor((D, F), "hidden", fan_in=D) for name in inward}
        tensors["down"] = Tensor((F, D), "hidden", fan_in=F, residual=True)
        if options.bias:
            tensors |= {f"{name}_bias": Tensor((tensor.shape[-1],), "vector") for name, tensor in tensors.items()}
        return tensors

    @staticmethod
    def flops(spec: Spec, options: MLPOptions, tokens: int = 1) -> Flops:
        matmul = 2 * spec.width * options.hidden * (2 if options.kind == "gelu" else 3)
        return Flops(matmul, matmul)

    def __call__(self, x: Float[Array, "*b D"]) -> tuple[Float[Array, "*b D"], dict[str, Any]]:
        """x -> (y, no auxiliary values)."""
        if self.options.kind == "swiglu":
            h = swiglu(self._linear(x, "gate"), self._linear(x, "up"))
        elif self.options.kind == "geglu":
            h = geglu(self._linear(x, "gate"), self._linear(x, "up"))
        else:
            h = gelu(self._linear(x, "up"))
        return self._linear(h, "down"), {}

    def _linear(self, x: Float[Array, "*b n"], name: str) -> Float[Array, "*b m"]:
        y = linear(x, self.weight(name))
        return y + self.weight(f"{name}_bias") if self.options.bias else y


@pointwise
def swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


@pointwise
def geglu(gate: Array, up: Array) -> Array:
    return jax.nn.gelu(gate, approximate=False) * up


@pointwise
def gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)
