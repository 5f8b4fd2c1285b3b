"""What a part of a model owes the rest: the contracts of sequence mixers and channel mixers.

A new mixer is a subclass in a file of its own and a line in `registry.py`. Everything that planning asks of it is a
static method of the config, so that planning builds no module.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import per_device
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Source, Tensor, with_base


class Part(nnx.Module):
    """A module whose parameters are declared by `tensors(spec, options)`, one float32 `nnx.Param` of the same name
    each. `lead` axes in front of every parameter hold the layers of a scanned stack. `base`: the options that it has
    in the base model (`spec.base`), where there is one."""

    grows: ClassVar[tuple[str, ...]] = ()  # options that grow with the width of a model of the same proportions

    def __init__(self, spec: Spec, options: Any, draw: Source, lead: tuple[int, ...] = (), base: Any = None):
        self.spec, self.options, self.base = spec, options, base
        for name, tensor in self.declared(spec, options, base).items():
            setattr(self, name, nnx.Param(draw(tensor, lead)))

    @staticmethod
    @abstractmethod
    def tensors(spec: Spec, options: Any) -> dict[str, Tensor]:
        """Its parameters by name."""

    @classmethod
    def declared(cls, spec: Spec, options: Any, base: Any = None) -> dict[str, Tensor]:
        """Its tensors, each with the one that it is in the base model."""
        tensors = cls.tensors(spec, options)
        return tensors if spec.base is None else with_base(tensors, cls.tensors(spec.base, base))

    def weight(self, name: str) -> Array:
        """A parameter in the compute dtype."""
        return getattr(self, name)[...].astype(self.spec.dtype)

    def exact(self, name: str) -> Array:
        """A parameter in float32; a hidden matrix must say so in its `Tensor`."""
        a = getattr(self, name)[...]
        assert a.dtype == jnp.float32, name
        return a

    def per_row(self, op: Callable[..., Any], *, shared: tuple[int, ...] = (), **options: Any) -> Callable[..., Any]:
        """An operation of `pallas_kernels` on rows of the batch, as this pass wants it run; arguments at the positions
        `shared` have no rows."""
        return per_device(partial(op, kernels=self.spec.kernels, **options), self.spec.mesh, shared)


class Mixer(Part):
    """Mixes along the sequence, causally. The full pass, step by step, and any split with the state carried over give
    the same outputs; rows of the batch, and documents by `segment_ids`, do not see each other."""

    Options: ClassVar[type]  # frozen dataclass; its fields are those of the mixer's section in the config

    @staticmethod
    @abstractmethod
    def check(options: Any, field: str, width: int) -> None:
        """Raises `BadInput` (names starting with `field`) for options that cannot be."""

    @staticmethod
    @abstractmethod
    def flops(spec: Spec, options: Any, seq_len: int) -> Flops:
        """Forward, per token."""

    @staticmethod
    @abstractmethod
    def decode_flops(spec: Spec, options: Any, context: int) -> float:
        """Of one decoded token that sees `context` tokens, itself included."""

    @staticmethod
    @abstractmethod
    def state_bytes(spec: Spec, options: Any, length: int, dtype_bytes: int) -> int:
        """That decoding a sequence of `length` tokens holds."""

    @abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Any]]:
        """x -> (y, state after x or None, aux). With a state, x continues what the state has seen. `aux["loss"]`, if
        any, is added to the training loss; other entries are counters."""

    @abstractmethod
    def init_state(self, batch: int, max_len: int) -> Any:
        """That of no token yet, for up to `max_len` of them."""

    def step(self, x_t: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
        """One more token of the same document: the full pass, of one. Mixers that use positions have their own."""
        y, after, _ = self(x_t[:, None], None, jnp.zeros((1, 1), jnp.int32), state)
        return y[:, 0], after


class ChannelMixer(Part):
    """Mixes the channels of each token by itself."""

    Options: ClassVar[type]

    @staticmethod
    @abstractmethod
    def check(options: Any, field: str, width: int) -> None:
        """Raises `BadInput` (names starting with `field`) for options that cannot be."""

    @staticmethod
    @abstractmethod
    def flops(spec: Spec, options: Any, tokens: int = 1) -> Flops:
        """Forward, per token of `tokens` at once."""

    @abstractmethod
    def __call__(self, x: Float[Array, "*b D"]) -> tuple[Float[Array, "*b D"], dict[str, Any]]:
        """x -> (y, aux as a mixer's)."""

    # What the training step asks. Counters are the aux without "loss": sums over tokens, so that those of the parts of
    # a batch add up; in a scanned stack with an axis of layers in front, as the parameters have.

    @staticmethod
    def joint(options: Any) -> bool:
        """Whether its loss on a part of a batch depends on the counters of the whole."""
        return False

    @staticmethod
    def rest_of_loss(options: Any, seen: dict[str, Array], whole: dict[str, Array]) -> Array:
        """What its loss on a part of a batch lacks, given the counters of the part and of the whole, where joint."""
        return jnp.zeros(())

    @staticmethod
    def after_step(options: Any, params: dict[str, Array], counters: dict[str, Array]) -> dict[str, Array]:
        """Its buffers that change after an optimiser step on a batch with these counters."""
        return {}

    @staticmethod
    def summary(options: Any, counters: dict[str, Array]) -> dict[str, Array]:
        """What to log of a batch: numbers and vectors for each layer."""
        return {}
