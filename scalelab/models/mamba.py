"""Mamba-1 (Gu & Dao 2023, arXiv 2312.00752) and Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): selective recurrences.

Mamba-1, inner width E = expand * D, every (channel, state) pair with a decay of its own:

    u, z = x W_in;  u = silu(conv(u));  r, B, C = u W_x;  dt = softplus(r W_dt + b_dt);  A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T     y_t = h_t C_t + D u_t     out = (y silu(z)) W_out

Mamba-2, E in H = E / P heads with one decay each; B and C are shared by the heads of a group:

    z, u, B, C = x W_in;  dt = softplus(x W_dt + dt_bias);  (u, B, C) = silu(conv(u, B, C))
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t u_t)^T     y_t = S_t^T C_t + D u_t     out = gnorm(y silu(z)) W_out

gnorm is RMSNorm after the gate, its mean square inside each group (eps 1e-5, as published). W_in and W_dt are one
matrix in public checkpoints of Mamba-2. Matrices start as torch's linear maps do, outputs divided by sqrt(L), whatever
`model.init` says of the other parts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import gated_norm, gated_recurrence, selective_scan
from scalelab.errors import BadInput
from scalelab.models.layers import linear, linears, pointwise
from scalelab.models.part import Mixer
from scalelab.models.sequence import beginnings, no_past, short_conv
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Depth, Tensor, between, constant, uniform
from scalelab.schema import at_least

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class MambaOptions:
    """See `schema.LATER_SECTIONS`."""

    expand: int
    state: int
    conv: int
    dt_rank: int
    chunk: int


class Mamba(Mixer):
    Options = MambaOptions
    grows = ("dt_rank",)

    # -------------------------------------------------------------------------------- pure functions of the config

    @staticmethod
    def check(options: MambaOptions, field: str, width: int) -> None:
        for name in ("expand", "state", "conv", "chunk"):
            at_least(f"{field}.{name}", getattr(options, name), 1)
        at_least(f"{field}.dt_rank", options.dt_rank, 0)

    @staticmethod
    def sizes(spec: Spec, options: MambaOptions) -> tuple[int, int]:
        """(E, R)."""
        return options.expand * spec.width, options.dt_rank or -(-spec.width // 16)

    @staticmethod
    def tensors(spec: Spec, options: MambaOptions) -> dict[str, Tensor]:
        D, N, K = spec.width, options.state, options.conv
        E, R = Mamba.sizes(spec, options)
        return {
            "inward": Tensor((D, 2 * E), "hidden", fan_in=D, start=uniform(D**-0.5)),
            "conv": Tensor((K, E), "vector", start=uniform(K**-0.5)),
            "conv_bias": Tensor((E,), "vector", start=uniform(K**-0.5)),
            "x": Tensor((E, R + 2 * N), "hidden", fan_in=E, start=uniform(E**-0.5)),
            "dt": Tensor((R, E), "hidden", fan_in=R, start=uniform(R**-0.5)),
            "dt_bias": Tensor((E,), "vector", start=dt_bias),
            "A_log": Tensor((E, N), "vector", start=constant(np.log(np.arange(1.0, N + 1)))),
            "D": Tensor((E,), "vector", fill=1.0),
            "out": Tensor((E, D), "hidden", fan_in=E, residual=True, start=residual_uniform(E)),
        }

    @staticmethod
    def flops(spec: Spec, options: MambaOptions, seq_len: int) -> Flops:
        D, N, K = spec.width, options.state, options.conv
        E, R = Mamba.sizes(spec, options)
        matrices = 2 * D * 2 * E + 2 * E * (R + 2 * N) + 2 * R * E + 2 * E * D
        return Flops(matrices + 2 * K * E + 7 * E * N + 4 * E, matrices)

    @staticmethod
    def decode_flops(spec: Spec, options: MambaOptions, context: int) -> float:
        return Mamba.flops(spec, options, 1).exact

    @staticmethod
    def state_bytes(spec: Spec, options: MambaOptions, length: int, dtype_bytes: int) -> int:
        E, _ = Mamba.sizes(spec, options)
        return E * options.state * 4 + E * (options.conv - 1) * dtype_bytes

    # -------------------------------------------------------------------------------- the module

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        o = self.options
        before = state or self.init_state(x.shape[0], x.shape[1])
        E, R = self.sizes(self.spec, o)
        u, z = linears(x, self.weight("inward"), E, E)
        (u,), past, past_segments = short_conv(
            [u], self.exact("conv"), self.exact("conv_bias"), before["conv"], segment_ids, before["conv_segments"],
            self.per_row,
        )  # fmt: skip
        rank, B, C = jnp.split(linear(u, self.weight("x")), [R, R + o.state], axis=-1)
        y, h = self.per_row(selective_scan.selective_scan, shared=(2, 7), chunk=o.chunk)(
            u,
            linear(rank, self.weight("dt")),
            -jnp.exp(self.exact("A_log")),
            B,
            C,
            before["h"] if state is not None else None,
            beginnings(segment_ids, before["segment"] if state is not None else None),
            self.exact("dt_bias"),
        )
        y = gated(y, u, z, self.weight("D"))
        after = None
        if state is not None:
            last = before["segment"] if segment_ids is None else segment_ids[:, -1]
            after = {"h": h, "conv": past, "conv_segments": past_segments, "segment": last}
        return linear(y, self.weight("out")), after, {}

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        E, _ = self.sizes(self.spec, self.options)
        past, past_segments = no_past(batch, self.options.conv, E, self.spec.dtype)
        return {
            "h": jnp.zeros((batch, E, self.options.state), jnp.float32),
            "conv": past,
            "conv_segments": past_segments,
            "segment": jnp.zeros((batch,), jnp.int32),
        }


@pointwise
def gated(y: Array, u: Array, z: Array, skip: Array) -> Array:
    """(y + D u) silu(z): the gate multiplies after the skip."""
    return (y + skip * u) * jax.nn.silu(z)


@dataclasses.dataclass(frozen=True)
class Mamba2Options:
    """See `schema.LATER_SECTIONS`."""

    expand: int
    head_dim: int
    state: int
    groups: int
    conv: int
    chunk: int


class Mamba2(Mixer):
    Options = Mamba2Options

    # -------------------------------------------------------------------------------- pure functions of the config

    @staticmethod
    def check(options: Mamba2Options, field: str, width: int) -> None:
        o = options
        for name in ("expand", "head_dim", "state", "groups", "conv", "chunk"):
            at_least(f"{field}.{name}", getattr(o, name), 1)
        if o.expand * width % o.head_dim:
            raise BadInput(f"config.{field}.head_dim", o.head_dim, f"must divide the inner width {o.expand * width}")
        if (o.expand * width // o.head_dim) % o.groups:
            heads = o.expand * width // o.head_dim
            raise BadInput(f"config.{field}.groups", o.groups, f"must divide the {heads} heads")

    @staticmethod
    def sizes(spec: Spec, options: Mamba2Options) -> tuple[int, int, int]:
        """(E, H, channels of the convolution)."""
        E = options.expand * spec.width
        return E, E // options.head_dim, E + 2 * options.groups * options.state

    @staticmethod
    def tensors(spec: Spec, options: Mamba2Options) -> dict[str, Tensor]:
        D = spec.width
        E, H, channels = Mamba2.sizes(spec, options)
        return {
            "inward": Tensor((D, E + channels), "hidden", fan_in=D, start=uniform(D**-0.5)),
            "dt": Tensor((D, H), "gate", fan_in=D, start=uniform(D**-0.5)),
            "conv": Tensor((options.conv, channels), "vector", start=uniform(options.conv**-0.5)),
            "conv_bias": Tensor((channels,), "vector", start=uniform(options.conv**-0.5)),
            "dt_bias": Tensor((H,), "vector", start=dt_bias),
            "A_log": Tensor((H,), "vector", start=lambda z, depth: jnp.log(between(1.0, 16.0)(z, depth))),
            "D": Tensor((H,), "vector", fill=1.0),
            "norm": Tensor((E,), "vector", fill=1.0),
            "out": Tensor((E, D), "hidden", fan_in=E, residual=True, start=residual_uniform(E)),
        }

    @staticmethod
    def flops(spec: Spec, options: Mamba2Options, seq_len: int) -> Flops:
        o, D, T = options, spec.width, seq_len
        (E, H, channels), G, N, P, Q = Mamba2.sizes(spec, o), o.groups, o.state, o.head_dim, min(o.chunk, T)
        c = (Q + 1) / 2
        matrices = 2 * D * (E + channels + H) + 2 * E * D
        exact = 2 * o.conv * channels + G * 2 * N * c + H * (2 * P * c + 4 * N * P + 2 * N * P / Q) + 2 * H * P
        padded = -(-T // Q) * Q / T
        return Flops(matrices + exact, matrices + padded * (G * 2 * N * Q + H * (2 * P * Q + 4 * N * P)))

    @staticmethod
    def decode_flops(spec: Spec, options: Mamba2Options, context: int) -> float:
        """The recurrence itself: decay and add 3 N P, read 2 N P, skip 2 P a head."""
        o, D = options, spec.width
        E, H, channels = Mamba2.sizes(spec, o)
        recurrence = H * (5 * o.state * o.head_dim + 2 * o.head_dim)
        return 2 * D * (E + channels + H) + 2 * E * D + 2 * o.conv * channels + recurrence

    @staticmethod
    def state_bytes(spec: Spec, options: Mamba2Options, length: int, dtype_bytes: int) -> int:
        E, _, channels = Mamba2.sizes(spec, options)
        return E * options.state * 4 + channels * (options.conv - 1) * dtype_bytes

    # -------------------------------------------------------------------------------- the module

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        o, (B, T, _) = self.options, x.shape
        E, H, _ = self.sizes(self.spec, o)
        before = state or self.init_state(B, T)
        keys = o.groups * o.state
        z, *inner = linears(x, self.weight("inward"), E, E, 2 * keys)
        (u, kq), past, past_segments = short_conv(
            inner, self.exact("conv"), self.exact("conv_bias"), before["conv"], segment_ids, before["conv_segments"],
            self.per_row,
        )  # fmt: skip
        u = u.reshape(B, T, H, o.head_dim)
        k, q = (a.reshape(B, T, o.groups, o.state) for a in jnp.split(kq, 2, axis=-1))
        dt, decay = self._rates(x)
        y, S = self.per_row(gated_recurrence.gated_recurrence, chunk=o.chunk)(
            q,
            k,
            u,
            decay,
            before["S"] if state is not None else None,
            beginnings(segment_ids, before["segment"] if state is not None else None),
            dt,
        )
        y = self.per_row(gated_norm.gated_norm, shared=(3, 4), groups=o.groups, eps=EPS)(
            y.reshape(B, T, E), u.reshape(B, T, E), z, self.weight("D"), self.exact("norm")
        )
        after = None
        if state is not None:
            last = before["segment"] if segment_ids is None else segment_ids[:, -1]
            after = {"S": S, "conv": past, "conv_segments": past_segments, "segment": last}
        return linear(y, self.weight("out")), after, {}

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        o = self.options
        _, H, channels = self.sizes(self.spec, o)
        past, past_segments = no_past(batch, o.conv, channels, self.spec.dtype)
        return {
            "S": jnp.zeros((batch, H, o.state, o.head_dim), jnp.float32),
            "conv": past,
            "conv_segments": past_segments,
            "segment": jnp.zeros((batch,), jnp.int32),
        }

    def _rates(self, x: Array) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """dt and log decay, float32."""
        dt = jax.nn.softplus(linear(x, self.weight("dt")).astype(jnp.float32) + self.exact("dt_bias"))
        return dt, -jnp.exp(self.exact("A_log")) * dt


def dt_bias(z: Array, depth: Depth) -> Array:
    """Inverse softplus of dt0, log-uniform in 1e-3 to 1e-1."""
    dt = jnp.exp(between(math.log(1e-3), math.log(1e-1))(z, depth))
    return dt + jnp.log(-jnp.expm1(-dt))


def residual_uniform(fan_in: int) -> Any:
    """U(+-1/sqrt(fan-in)) / sqrt(L): L residual branches add up."""
    return lambda z, depth: uniform(fan_in**-0.5)(z, depth) / math.sqrt(depth.layers)
