"""Linear attention with a decay that is learned (GLA) or fixed (Lightning), and what linear mixers share.

gla        q, k = x Wq, x Wk (D -> D / 2);  v = x Wv;  g = logsig(x Wg1 Wg2 + bg) / 16, one per key channel
           S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t / sqrt(dk)
           out = (norm_head(o) * silu(x Wgate)) Wo     (Yang et al. 2023, arXiv 2312.06635)
lightning  q, k, v = silu(x W);  S_t = e^{-s_h} S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t
           out = (norm(o) * sigma(x Wgate)) Wo      (Qin et al. 2024, arXiv 2401.04658; MiniMax 2025, 2501.08313)

GLA: RMSNorm inside each head with one gain of dv for all; optional short convolution with silu on q, k and v (0: none,
as published). bg = 0, so that decays start near e^{-0.043} *(choice)*; other matrices start as `model.init` says.
Lightning: s_h = 2^{-8h/H} (1 - l / (L - 1) + 1e-5) for head h = 1 .. H of layer l = 0 .. L - 1 of the whole stack (l /
(L - 1) counts as 0 for L = 1), by ALiBi's interpolation where H is no power of two. Full-width RMSNorm with a gain and
a gate D -> H d, as in MiniMax. (The TransNormer paper's norm has no gain; its example module takes LayerNorm and a
low-rank gate; flash-linear-attention has other slopes.)
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import gated_recurrence, gla
from scalelab.errors import BadInput
from scalelab.models.layers import linear, linears, pointwise, rms_norm
from scalelab.models.part import Mixer
from scalelab.models.sequence import beginnings, no_past, short_conv
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Depth, Tensor, uniform
from scalelab.schema import at_least

GATE_RANK, GATE_DIVISOR = 16, 16


class Sizes(NamedTuple):
    groups: int  # heads of the queries and keys
    dk: int
    heads: int  # of the values; each group serves heads / groups consecutive ones
    dv: int
    conv: int  # length of the short convolution over q, k and v; 0: none

    @property
    def keys(self) -> int:
        return self.groups * self.dk

    @property
    def values(self) -> int:
        return self.heads * self.dv

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return 2 * self.keys + self.values if self.conv else 0


class LinearMixer(Mixer):
    """A mixer whose state is S of every head, and the last inputs of a short convolution over q, k and v."""

    # -------------------------------------------------------------------------------- a mixer's own

    @staticmethod
    @abstractmethod
    def sizes(spec: Spec, options: Any) -> Sizes:
        """Of the options at this width."""

    @abstractmethod
    def recur(
        self, x: Array, q: Array, k: Array, v: Array, S: Array | None, reset: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
        """The recurrence over x's queries, keys and values, after the convolution, from S on -> (o, S)."""

    @abstractmethod
    def read(self, x: Float[Array, "B T D"], o: Float[Array, "B T H dv"]) -> Float[Array, "B T H*dv"]:
        """What Wo multiplies."""

    # -------------------------------------------------------------------------------- shared

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        sizes, (B, T, _) = self.sizes(self.spec, self.options), x.shape
        before = state or self.init_state(B, T)
        after = {"segment": before["segment"] if segment_ids is None else segment_ids[:, -1]}
        qkv = linears(x, self.weight("qkv"), sizes.keys, sizes.keys, sizes.values)
        if sizes.conv:
            qkv, after["conv"], after["conv_segments"] = short_conv(
                qkv, self.exact("conv"), None, before["conv"], segment_ids, before["conv_segments"], self.per_row
            )
        else:
            qkv = map(self.activation, qkv)
        q, k, v = qkv
        q, k = (a.reshape(B, T, sizes.groups, sizes.dk) for a in (q, k))
        reset = beginnings(segment_ids, None if state is None else before["segment"])
        o, after["S"] = self.recur(
            x, q, k, v.reshape(B, T, sizes.heads, sizes.dv), None if state is None else before["S"], reset
        )
        y = linear(self.read(x, o), self.weight("out"))
        return y, None if state is None else after, {}

    def activation(self, qkv: Array) -> Array:
        """Of queries, keys and values before the recurrence, where no convolution has it."""
        return jax.nn.silu(qkv)

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        sizes = self.sizes(self.spec, self.options)
        state = {
            "S": jnp.zeros((batch, sizes.heads, sizes.dk, sizes.dv), jnp.float32),
            "segment": jnp.zeros((batch,), jnp.int32),
        }
        if sizes.conv:
            state["conv"], state["conv_segments"] = no_past(batch, sizes.conv, sizes.channels, self.spec.dtype)
        return state


def shared_tensors(spec: Spec, sizes: Sizes) -> dict[str, Tensor]:
    """W_q, W_k and W_v side by side, the convolution's taps, W_o."""
    D = spec.width
    tensors = {"qkv": Tensor((D, 2 * sizes.keys + sizes.values), "hidden", fan_in=D)}
    if sizes.conv:
        tensors["conv"] = Tensor((sizes.conv, sizes.channels), "vector", start=uniform(sizes.conv**-0.5))
    return tensors | {"out": Tensor((sizes.values, D), "hidden", fan_in=sizes.values, residual=True)}


def shared_flops(spec: Spec, sizes: Sizes) -> Flops:
    """Of the products with those tensors, per token: (with the convolution, without)."""
    matrices = 2 * spec.width * (2 * sizes.keys + 2 * sizes.values)
    return Flops(matrices + 2 * sizes.conv * sizes.channels, matrices)


def state_bytes(sizes: Sizes, dtype_bytes: int) -> int:
    return sizes.heads * sizes.dk * sizes.dv * 4 + max(0, sizes.conv - 1) * sizes.channels * dtype_bytes


def padding(seq_len: int, chunk: int) -> float:
    """Tokens that a chunked form works on for each one that there is."""
    return -(-seq_len // chunk) * chunk / seq_len


def gated_head_norm(
    o: Float[Array, "B T H dv"], gate: Float[Array, "B T H*dv"] | None, gain: Float[Array, " dv"], eps: float
) -> Float[Array, "B T H*dv"]:
    """RMSNorm inside each head, one gain for all heads; then times silu(gate). Float32 inside."""

    @pointwise
    def norm(o: Array, gate: Array | None, gain: Array) -> Array:
        y = o.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps) * gain
        y = y.reshape(*y.shape[:-2], -1)
        return (y if gate is None else y * jax.nn.silu(gate.astype(jnp.float32))).astype(o.dtype)

    return norm(o, gate, gain)


def check_chunk(chunk: int, field: str) -> None:
    at_least(f"{field}.chunk", chunk, 1)
    if chunk & (chunk - 1):
        raise BadInput(f"config.{field}.chunk", chunk, "must be a power of two")


# ------------------------------------------------------------------------------------------- GLA


@dataclasses.dataclass(frozen=True)
class GLAOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    conv: int
    chunk: int


class GLA(LinearMixer):
    Options = GLAOptions
    grows = ("heads",)

    @staticmethod
    def check(options: GLAOptions, field: str, width: int) -> None:
        at_least(f"{field}.heads", options.heads, 1)
        at_least(f"{field}.conv", options.conv, 0)
        check_chunk(options.chunk, field)
        if width % (2 * options.heads):
            raise BadInput(f"config.{field}.heads", options.heads, f"must divide half of the width {width}")

    @staticmethod
    def sizes(spec: Spec, options: GLAOptions) -> Sizes:
        H, D = options.heads, spec.width
        return Sizes(H, D // 2 // H, H, D // H, options.conv)

    @staticmethod
    def tensors(spec: Spec, options: GLAOptions) -> dict[str, Tensor]:
        D, sizes = spec.width, GLA.sizes(spec, options)
        return shared_tensors(spec, sizes) | {
            "decay_in": Tensor((D, GATE_RANK), "gate", fan_in=D),
            "decay_out": Tensor((GATE_RANK, sizes.keys), "hidden", fan_in=GATE_RANK),  # a fan-in that does not grow
            "decay_bias": Tensor((sizes.keys,), "vector"),
            "gate": Tensor((D, D), "hidden", fan_in=D),
            "norm": Tensor((sizes.dv,), "vector", fill=1.0),
        }

    @staticmethod
    def _matrices(spec: Spec, options: GLAOptions) -> Flops:
        D, shared = spec.width, shared_flops(spec, GLA.sizes(spec, options))
        own = 2 * D * GATE_RANK + 2 * GATE_RANK * D // 2 + 2 * D * D
        return Flops(shared.exact + own, shared.matmul + own)

    @staticmethod
    def flops(spec: Spec, options: GLAOptions, seq_len: int) -> Flops:
        H, dk, _, dv, _ = GLA.sizes(spec, options)
        matrices, c = GLA._matrices(spec, options), (min(options.chunk, seq_len) + 1) / 2
        Q = min(options.chunk, 1 << (seq_len - 1).bit_length())
        run = H * (2 * (math.log2(Q) * dk + dv) * Q + 4 * dk * dv)
        return Flops(
            matrices.exact + H * (2 * (dk + dv) * c + 4 * dk * dv), matrices.matmul + padding(seq_len, Q) * run
        )

    @staticmethod
    def decode_flops(spec: Spec, options: GLAOptions, context: int) -> float:
        """The recurrence itself: decay and add 3 dk dv, read 2 dk dv a head."""
        H, dk, _, dv, _ = GLA.sizes(spec, options)
        return GLA._matrices(spec, options).exact + H * 5 * dk * dv

    @staticmethod
    def state_bytes(spec: Spec, options: GLAOptions, length: int, dtype_bytes: int) -> int:
        return state_bytes(GLA.sizes(spec, options), dtype_bytes)

    def activation(self, qkv: Array) -> Array:
        return qkv

    def recur(
        self, x: Array, q: Array, k: Array, v: Array, S: Array | None, reset: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
        raw = linear(linear(x, self.weight("decay_in")), self.weight("decay_out"))
        g = jax.nn.log_sigmoid(raw.astype(jnp.float32) + self.exact("decay_bias")) / GATE_DIVISOR
        q = q * q.shape[-1] ** -0.5
        return self.per_row(gla.gla, chunk=self.options.chunk)(q, k, v, g.reshape(q.shape), S, reset)

    def read(self, x: Float[Array, "B T D"], o: Float[Array, "B T H dv"]) -> Float[Array, "B T H*dv"]:
        return gated_head_norm(o, linear(x, self.weight("gate")), self.exact("norm"), self.spec.norm_eps)


# ------------------------------------------------------------------------------------------- Lightning


@dataclasses.dataclass(frozen=True)
class LightningOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    head_dim: int
    chunk: int


class Lightning(LinearMixer):
    Options = LightningOptions
    grows = ("heads",)

    @staticmethod
    def check(options: LightningOptions, field: str, width: int) -> None:
        for name in ("heads", "head_dim", "chunk"):
            at_least(f"{field}.{name}", getattr(options, name), 1)

    @staticmethod
    def sizes(spec: Spec, options: LightningOptions) -> Sizes:
        H, d = options.heads, options.head_dim
        return Sizes(H, d, H, d, 0)

    @staticmethod
    def tensors(spec: Spec, options: LightningOptions) -> dict[str, Tensor]:
        D, sizes = spec.width, Lightning.sizes(spec, options)
        return shared_tensors(spec, sizes) | {
            "slopes": Tensor((options.heads,), "buffer", start=layer_slopes(options.heads)),
            "gate": Tensor((D, sizes.values), "hidden", fan_in=D),
            "norm": Tensor((sizes.values,), "vector", fill=1.0),
        }

    @staticmethod
    def _matrices(spec: Spec, options: LightningOptions) -> float:
        sizes = Lightning.sizes(spec, options)
        return shared_flops(spec, sizes).matmul + 2 * spec.width * sizes.values

    @staticmethod
    def flops(spec: Spec, options: LightningOptions, seq_len: int) -> Flops:
        H, d, Q = options.heads, options.head_dim, min(options.chunk, seq_len)
        matrices, c = Lightning._matrices(spec, options), (Q + 1) / 2
        run = H * (4 * d * Q + 4 * d * d)
        return Flops(matrices + H * (4 * d * c + 4 * d * d + 2 * d * d / Q), matrices + padding(seq_len, Q) * run)

    @staticmethod
    def decode_flops(spec: Spec, options: LightningOptions, context: int) -> float:
        """The recurrence itself: decay and add 3 d^2, read 2 d^2 a head."""
        return Lightning._matrices(spec, options) + options.heads * 5 * options.head_dim**2

    @staticmethod
    def state_bytes(spec: Spec, options: LightningOptions, length: int, dtype_bytes: int) -> int:
        return state_bytes(Lightning.sizes(spec, options), dtype_bytes)

    def recur(
        self, x: Array, q: Array, k: Array, v: Array, S: Array | None, reset: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
        decay = jnp.broadcast_to(-jax.lax.stop_gradient(self.exact("slopes")), v.shape[:3])
        return self.per_row(gated_recurrence.gated_recurrence, chunk=self.options.chunk)(q, k, v, decay, S, reset)

    def read(self, x: Float[Array, "B T D"], o: Float[Array, "B T H dv"]) -> Float[Array, "B T H*dv"]:
        normed = rms_norm(o.reshape(*o.shape[:2], -1), self.exact("norm"), self.spec.norm_eps)
        return sigmoid_gate(normed, linear(x, self.weight("gate")))


@pointwise
def sigmoid_gate(y: Array, gate: Array) -> Array:
    return y * jax.nn.sigmoid(gate)


def alibi(heads: int) -> list[float]:
    """2^{-8h/H}, h = 1 .. H; where H is no power of two, those of the next lower one n, then every other one of 2n."""
    n = 1 << (heads.bit_length() - 1)
    of_power = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    return of_power if n == heads else of_power + alibi(2 * n)[::2][: heads - n]


def layer_slopes(heads: int) -> Callable[[Array, Depth], Array]:
    """Deeper layers forget less, the last barely at all."""

    def start(z: Array, depth: Depth) -> Array:
        share = 1 - depth.layer / max(1, depth.layers - 1) + 1e-5
        return jnp.broadcast_to(jnp.array(alibi(heads)) * share, z.shape)

    return start
