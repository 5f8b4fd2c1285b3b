"""The `model` section of a config, resolved: every block with its own options, all of it frozen and hashable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from scalelab.errors import BadInput
from scalelab.parametrization import Init


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    mixer: str
    mixer_options: Any
    channel: str  # or "none"
    channel_options: Any
    layer: int = 0  # number of its first copy in the stack, from 0; the others follow `stride` apart
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """A stack is prefix + period * repeats + suffix. The other fields are those of the config, see `schema.base`."""

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
    # Not of the config, but of the pass: whether it is a training one, and how many devices share the batch.
    training: bool = False
    shards: int = 1

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        return self.prefix + self.period * self.repeats + self.suffix

    def copies(self, part: str) -> int:
        """How often what is declared once under that top-level name is there."""
        return self.repeats if part == "period" else 1

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def init(self) -> Init:
        branches = sum(1 + (block.channel != "none") for block in self.blocks)
        return Init(self.init_kind, self.init_std, self.width, branches, len(self.blocks))


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
