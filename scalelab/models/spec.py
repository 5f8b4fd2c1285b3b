"""The `model` section of a config, resolved: every block with its own options, all of it frozen and hashable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from scalelab.errors import BadInput
from scalelab.parametrization import ALPHA, Init


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    mixer: str
    mixer_options: Any
    channel: str  # or "none"
    channel_options: Any
    mixer_base: Any = None  # options in the base model, under muP and CompleteP
    channel_base: Any = None
    layer: int = 0  # number of its first copy in the stack, from 0; the others follow `stride` apart
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class RecursionOptions:
    """See `schema.LATER_SECTIONS`."""

    count: int
    capacities: tuple[float, ...]
    alpha: float
    temperature: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Spec:
    """A stack is prefix + period * repeats, as often as there are recursions, + suffix. The other fields are those of
    the config, see `schema.base`. Depth, for initialisation and CompleteP, is that of a pass: layers that recursions
    share count once a recursion (choice)."""

    vocab_size: int
    width: int
    prefix: tuple[BlockSpec, ...]
    period: tuple[BlockSpec, ...]
    repeats: int
    suffix: tuple[BlockSpec, ...]
    norm: str
    norm_eps: float
    placement: str
    embed_norm: bool
    positions: int
    tied_embeddings: bool
    logit_cap: float
    init_kind: str
    init_std: float
    compute_dtype: str
    remat: str
    loss_chunk: int
    streams: int
    stream_prefix: int
    stream_smoothing: float
    base: Spec | None  # the base model of muP and CompleteP, its width alone set: what tensors' fan-ins compare with
    base_layers: int  # as `model.layers`: those that recursions share once
    depth_scaled: bool  # CompleteP
    embed_multiplier: float
    logit_multiplier: float
    recursion: RecursionOptions
    # Not of the model, but of the pass: whether it is a training one, which implementations of the kernels it takes
    # (`pallas_kernels.dispatch`), the mesh of the devices that share the batch (`pallas_kernels.devices`), and how many
    # of the repeats the program writes out one by one.
    training: bool = False
    kernels: str = "auto"
    mesh: Mesh | None = None
    unroll: int = 1

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The layers of a pass, in order."""
        return self.prefix + self.period * (self.repeats * self.recursion.count) + self.suffix

    def applied(self, layers: int) -> int:
        """Layers of a pass through a stack of `layers` with this prefix and suffix."""
        return layers + (self.recursion.count - 1) * (layers - len(self.prefix) - len(self.suffix))

    def copies(self, part: str) -> int:
        """How often what is declared once under that top-level name is there."""
        return self.repeats if part == "period" else 1

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def init(self) -> Init:
        branches, layers = sum(1 + (block.channel != "none") for block in self.blocks), len(self.blocks)
        if self.base is None:
            return Init(self.init_kind, self.init_std, self.width, branches, layers)
        base_layers = self.applied(self.base_layers)
        branches *= base_layers / layers
        return Init(self.init_kind, self.init_std, self.base.width, branches, layers, base_layers)

    @property
    def width_ratio(self) -> float:
        """m_N."""
        return 1.0 if self.base is None else self.width / self.base.width

    @property
    def depth_ratio(self) -> float:
        """m_L; 1 where depth is not scaled."""
        return len(self.blocks) / self.applied(self.base_layers) if self.depth_scaled else 1.0

    @property
    def at_base(self) -> bool:
        """Whether it has its base model's shape, where every parametrisation is the standard one."""
        same = all((b.mixer_options, b.channel_options) == (b.mixer_base, b.channel_base) for b in self.blocks)
        return self.width_ratio == 1 and self.depth_ratio == 1 and same

    @property
    def residual_multiplier(self) -> float:
        return self.depth_ratio**-ALPHA

    @property
    def logits_multiplier(self) -> float:
        return self.logit_multiplier / self.width_ratio


class Flops(NamedTuple):
    """Forward FLOPs per token: `exact` by the project's convention (causal attention counted as causal), and `matmul`,
    the matrix products as the plain XLA form runs them (attention as the full square)."""

    exact: float
    matmul: float


def options(kind: type, section: Mapping[str, Any], changes: Mapping[str, Any], field: str) -> Any:
    """A block's options: those of its section in the config, with the block's own on top."""
    values = {f.name: section[f.name] for f in dataclasses.fields(kind)}
    for name, value in changes.items():
        if name not in values:
            raise BadInput(f"{field}.{name}", value, f"no such option; known: {', '.join(sorted(values))}")
        if isinstance(values[name], float) and type(value) is int:
            value = float(value)
        if type(value) is not type(values[name]):
            raise BadInput(f"{field}.{name}", value, f"must be of type {type(values[name]).__name__}")
        values[name] = value
    return kind(**values)
