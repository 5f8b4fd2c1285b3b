"""One layer: a sequence mixer and a channel mixer (or none), each a residual branch with norms around it.

pre   x + f(N(x))            post  N(x + f(x))
peri  x + N_out(f(N_in(x)))  out   x + N_out(f(x))

Under CompleteP every branch is multiplied by L_base / L where it is added, behind its norm if it ends in one (published
for `pre`; the others are a choice).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from scalelab.models.layers import Norm, scaled
from scalelab.models.parscale import StreamVector
from scalelab.models.registry import CHANNELS, MIXERS
from scalelab.models.spec import BlockSpec, Flops, Spec
from scalelab.parametrization import Source

NORMS = {"pre": ("norm",), "post": ("norm",), "peri": ("norm", "norm_out"), "out": ("norm_out",)}


def keyless_streams(spec: Spec, block: BlockSpec) -> bool:
    """Whether the streams of ParScale must be told apart at the mixer's input, since it has no keys for a prefix."""
    return spec.streams > 1 and block.mixer != "attention"


class Block(nnx.Module):
    def __init__(self, spec: Spec, block: BlockSpec, draw: Source, lead: tuple[int, ...] = ()):
        self.spec, self.block = spec, block
        copies = lead[0] if lead else 1
        draw = partial(draw, layer=block.layer + block.stride * np.arange(copies))
        self.mixer = MIXERS[block.mixer](spec, block.mixer_options, draw, lead, block.mixer_base)
        if keyless_streams(spec, block):
            self.stream = StreamVector(spec, None, draw, lead)
        self.mixer_norms = nnx.Dict({name: Norm(spec, None, draw, lead) for name in NORMS[spec.placement]})
        if block.channel != "none":
            self.channel = CHANNELS[block.channel](spec, block.channel_options, draw, lead, block.channel_base)
            self.channel_norms = nnx.Dict({name: Norm(spec, None, draw, lead) for name in NORMS[spec.placement]})

    @staticmethod
    def tensors(spec: Spec, block: BlockSpec) -> dict[str, Any]:
        """The tree of its parameters, each as declared."""
        norms = {name: Norm.declared(spec, None) for name in NORMS[spec.placement]}
        mixer = MIXERS[block.mixer].declared(spec, block.mixer_options, block.mixer_base)
        tree: dict[str, Any] = {"mixer": mixer, "mixer_norms": norms}
        if keyless_streams(spec, block):
            tree["stream"] = StreamVector.declared(spec, None)
        if block.channel != "none":
            channel = CHANNELS[block.channel].declared(spec, block.channel_options, block.channel_base)
            tree |= {"channel": channel, "channel_norms": norms}
        return tree

    @staticmethod
    def flops(spec: Spec, block: BlockSpec, seq_len: int, batch: int = 1) -> Flops:
        mixer = MIXERS[block.mixer].flops(spec, block.mixer_options, seq_len)
        if block.channel == "none":
            return mixer
        channel = CHANNELS[block.channel].flops(spec, block.channel_options, batch * seq_len)
        return Flops(mixer.exact + channel.exact, mixer.matmul + channel.matmul)

    @staticmethod
    def decode_flops(spec: Spec, block: BlockSpec, context: int) -> float:
        mixer = MIXERS[block.mixer].decode_flops(spec, block.mixer_options, context)
        if block.channel == "none":
            return mixer
        return mixer + CHANNELS[block.channel].flops(spec, block.channel_options).exact

    @staticmethod
    def state_bytes(spec: Spec, block: BlockSpec, length: int, dtype_bytes: int) -> int:
        return MIXERS[block.mixer].state_bytes(spec, block.mixer_options, length, dtype_bytes)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Any]]:
        """x -> (y, the mixer's state after x, {"mixer": aux, "channel": aux} where they have any)."""
        x, state, aux = self._branch(
            x, lambda x: self.mixer(self._streams(x), segment_ids, positions, state), self.mixer_norms
        )
        x, channel_aux = self._channel(x)
        return x, state, {name: a for name, a in (("mixer", aux), ("channel", channel_aux)) if a}

    def init_state(self, batch: int, max_len: int) -> Any:
        return self.mixer.init_state(batch, max_len)

    def step(self, x_t: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
        x_t, state = self._branch(x_t, lambda x: self.mixer.step(self._streams(x), state), self.mixer_norms)
        return self._channel(x_t)[0], state

    def _streams(self, x: Array) -> Array:
        return self.stream(x) if keyless_streams(self.spec, self.block) else x

    def _channel(self, x: Array) -> tuple[Array, Any]:
        if self.block.channel == "none":
            return x, {}
        return self._branch(x, self.channel, self.channel_norms)

    def _branch(self, x: Array, f: Callable[[Array], tuple[Any, ...]], norms: Any) -> Any:
        """Residual branch; f returns its output and whatever else it has to say, which is passed on."""
        placement = self.spec.placement
        y, *rest = f(norms["norm"](x) if placement in ("pre", "peri") else x)
        y = norms["norm_out"](y) if placement in ("peri", "out") else y
        x = x + scaled(y, self.spec.residual_multiplier)
        return (norms["norm"](x) if placement == "post" else x), *rest
