"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) and Gated DeltaNet (2412.06464): recurrences that correct what the
state answers to a key, instead of adding to it.

    q, k, v = silu(conv(x W));  q, k = l2(q) / sqrt(dk), l2(k);  beta = sigma(x Wb), one per head
    R_t = e^{g_t} S_{t-1};  S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T;  o_t = S_t^T q_t

deltanet        g = 0;                                     out = norm_head(o) Wo
gated_deltanet  g = -exp(A_log) softplus(x Wa + dt_bias);  out = (norm_head(o) * silu(x Wg)) Wo

`negative`: beta = 2 sigma(x Wb), so that the eigenvalue 1 - beta of the transition lies in (-1, 1), which tracking a
state such as parity needs (Grazzi et al. 2024, arXiv 2411.12537). l2(x) = x / sqrt(sum x^2 + 1e-6) per head; it, beta
and g are float32. norm_head is RMSNorm inside each head with one gain of dv for all; norm first, then gate (the reverse
of Mamba-2). The convolution has no bias. Each key head serves value_heads / heads consecutive value heads. A_log = log
U(0, 16), with 1e-3 for 0 *(choice)*, dt_bias as Mamba-2's; matrices start as `model.init` says.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import delta_rule
from pallas_kernels.delta_rule.xla import BLOCK
from scalelab.errors import BadInput
from scalelab.models.layers import linear, pointwise
from scalelab.models.linear_attention import (
    LinearMixer,
    Sizes,
    gated_head_norm,
    padding,
    shared_flops,
    shared_tensors,
    state_bytes,
)  # fmt: skip
from scalelab.models.mamba import dt_bias
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Tensor, between
from scalelab.schema import at_least


def rule_flops(sizes: Sizes, chunk: int, seq_len: int) -> Flops:
    """Of the chunked delta rule, per token."""
    G, dk, H, dv, _ = sizes
    Q = min(chunk, seq_len)
    exact = H * ((Q + 1) * (3 * dk + 2 * dv) + 6 * dk * dv + Q * Q / 3)
    run = G * 4 * dk * Q + H * (2 * Q * (dk + 2 * dv) + 6 * dk * dv + inversion_flops(Q) / Q)
    return Flops(exact, padding(seq_len, Q) * run)


def inversion_flops(Q: int) -> float:
    """Of `invert` in the kernel's plain form."""
    if Q > BLOCK and Q % 2 == 0:
        return 2 * inversion_flops(Q // 2) + 4 * (Q // 2) ** 3
    return 2 * Q * Q * (Q - 1)


class DeltaMixer(LinearMixer):
    """What both share: unit keys and queries, and a writing strength for each head."""

    def recur(
        self, x: Array, q: Array, k: Array, v: Array, S: Array | None, reset: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
        o = self.options
        beta = (1 + o.negative) * jax.nn.sigmoid(linear(x, self.weight("beta")).astype(jnp.float32))
        q, k = unit(q, q.shape[-1] ** -0.5), unit(k, 1.0)
        return self.per_row(delta_rule.delta_rule, chunk=o.chunk)(q, k, v, beta, self.log_decay(x), S, reset)

    def log_decay(self, x: Array) -> Float[Array, "B T H"] | None:
        return None


def unit(x: Float[Array, "*b d"], length: float) -> Float[Array, "*b d"]:
    """length * x / sqrt(sum x^2 + 1e-6), in float32."""

    @pointwise
    def normalise(x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * (length * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + 1e-6))
        return y.astype(x.dtype)

    return normalise(x)


# ------------------------------------------------------------------------------------------- DeltaNet


@dataclasses.dataclass(frozen=True)
class DeltaNetOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    conv: int
    negative: bool
    chunk: int


class DeltaNet(DeltaMixer):
    Options = DeltaNetOptions
    grows = ("heads",)

    @staticmethod
    def check(options: DeltaNetOptions, field: str, width: int) -> None:
        for name in ("heads", "conv", "chunk"):
            at_least(f"{field}.{name}", getattr(options, name), 1)
        if width % options.heads:
            raise BadInput(f"config.{field}.heads", options.heads, f"must divide the width {width}")

    @staticmethod
    def sizes(spec: Spec, options: DeltaNetOptions) -> Sizes:
        H, d = options.heads, spec.width // options.heads
        return Sizes(H, d, H, d, options.conv)

    @staticmethod
    def tensors(spec: Spec, options: DeltaNetOptions) -> dict[str, Tensor]:
        D, sizes = spec.width, DeltaNet.sizes(spec, options)
        return shared_tensors(spec, sizes) | {
            "beta": Tensor((D, sizes.heads), "gate", fan_in=D),
            "norm": Tensor((sizes.dv,), "vector", fill=1.0),
        }

    @staticmethod
    def _matrices(spec: Spec, options: DeltaNetOptions) -> Flops:
        shared, beta = shared_flops(spec, DeltaNet.sizes(spec, options)), 2 * spec.width * options.heads
        return Flops(shared.exact + beta, shared.matmul + beta)

    @staticmethod
    def flops(spec: Spec, options: DeltaNetOptions, seq_len: int) -> Flops:
        matrices = DeltaNet._matrices(spec, options)
        rule = rule_flops(DeltaNet.sizes(spec, options), options.chunk, seq_len)
        return Flops(matrices.exact + rule.exact, matrices.matmul + rule.matmul)

    @staticmethod
    def decode_flops(spec: Spec, options: DeltaNetOptions, context: int) -> float:
        """The recurrence itself: ask, add and read, 2 dk dv each a head."""
        _, dk, H, dv, _ = DeltaNet.sizes(spec, options)
        return DeltaNet._matrices(spec, options).exact + H * 6 * dk * dv

    @staticmethod
    def state_bytes(spec: Spec, options: DeltaNetOptions, length: int, dtype_bytes: int) -> int:
        return state_bytes(DeltaNet.sizes(spec, options), dtype_bytes)

    def read(self, x: Float[Array, "B T D"], o: Float[Array, "B T H dv"]) -> Float[Array, "B T H*dv"]:
        return gated_head_norm(o, None, self.exact("norm"), self.spec.norm_eps)


# ------------------------------------------------------------------------------------------- Gated DeltaNet


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int
    negative: bool
    chunk: int


class GatedDeltaNet(DeltaMixer):
    Options = GatedDeltaNetOptions
    grows = ("heads", "value_heads")

    @staticmethod
    def check(options: GatedDeltaNetOptions, field: str, width: int) -> None:
        o = options
        for name in ("heads", "value_heads", "key_dim", "value_dim", "conv", "chunk"):
            at_least(f"{field}.{name}", getattr(o, name), 1)
        if o.value_heads % o.heads:
            raise BadInput(f"config.{field}.value_heads", o.value_heads, f"must be a multiple of heads = {o.heads}")

    @staticmethod
    def sizes(spec: Spec, options: GatedDeltaNetOptions) -> Sizes:
        o = options
        return Sizes(o.heads, o.key_dim, o.value_heads, o.value_dim, o.conv)

    @staticmethod
    def tensors(spec: Spec, options: GatedDeltaNetOptions) -> dict[str, Tensor]:
        D, sizes = spec.width, GatedDeltaNet.sizes(spec, options)
        return shared_tensors(spec, sizes) | {
            "beta": Tensor((D, sizes.heads), "gate", fan_in=D),
            "dt": Tensor((D, sizes.heads), "gate", fan_in=D),
            "dt_bias": Tensor((sizes.heads,), "vector", start=dt_bias),
            "A_log": Tensor((sizes.heads,), "vector", start=lambda z, depth: jnp.log(between(1e-3, 16.0)(z, depth))),
            "gate": Tensor((D, sizes.values), "hidden", fan_in=D),
            "norm": Tensor((sizes.dv,), "vector", fill=1.0),
        }

    @staticmethod
    def _matrices(spec: Spec, options: GatedDeltaNetOptions) -> Flops:
        sizes = GatedDeltaNet.sizes(spec, options)
        shared, own = shared_flops(spec, sizes), 2 * spec.width * (2 * sizes.heads + sizes.values)
        return Flops(shared.exact + own, shared.matmul + own)

    @staticmethod
    def flops(spec: Spec, options: GatedDeltaNetOptions, seq_len: int) -> Flops:
        matrices = GatedDeltaNet._matrices(spec, options)
        rule = rule_flops(GatedDeltaNet.sizes(spec, options), options.chunk, seq_len)
        return Flops(matrices.exact + rule.exact, matrices.matmul + rule.matmul)

    @staticmethod
    def decode_flops(spec: Spec, options: GatedDeltaNetOptions, context: int) -> float:
        """The recurrence itself: decay dk dv; ask, add and read, 2 dk dv each a head."""
        _, dk, H, dv, _ = GatedDeltaNet.sizes(spec, options)
        return GatedDeltaNet._matrices(spec, options).exact + H * 7 * dk * dv

    @staticmethod
    def state_bytes(spec: Spec, options: GatedDeltaNetOptions, length: int, dtype_bytes: int) -> int:
        return state_bytes(GatedDeltaNet.sizes(spec, options), dtype_bytes)

    def log_decay(self, x: Array) -> Float[Array, "B T H"] | None:
        dt = jax.nn.softplus(linear(x, self.weight("dt")).astype(jnp.float32) + self.exact("dt_bias"))
        return -jnp.exp(self.exact("A_log")) * dt

    def read(self, x: Float[Array, "B T D"], o: Float[Array, "B T H dv"]) -> Float[Array, "B T H*dv"]:
        return gated_head_norm(o, linear(x, self.weight("gate")), self.exact("norm"), self.spec.norm_eps)
