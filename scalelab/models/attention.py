"""Causal grouped-query attention: rotary positions, QK-norm, sliding window, document masks (Vaswani et al. 2017;
Ainslie et al. 2023).

Query head h reads key-value head floor(h Hk / H). A window of w keys includes the token itself. Order in the row, not
`positions`, decides what is in the past and how far; `positions` only turn the rotary embedding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import attention
from pallas_kernels.attention import visible
from scalelab.errors import BadInput
from scalelab.models import parscale
from scalelab.models.layers import linear, rms_norm, rope
from scalelab.models.part import Mixer
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Tensor
from scalelab.schema import at_least


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """See `schema.base`."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: bool
    qk_norm_full: bool
    window: int
    soft_cap: float
    bias: bool
    qkv_bias: bool


class Attention(Mixer):
    Options = AttentionOptions
    grows = ("heads", "kv_heads")
    q: nnx.Param
    k: nnx.Param
    v: nnx.Param
    out: nnx.Param

    # -------------------------------------------------------------------------------- pure functions of the config

    @staticmethod
    def check(options: AttentionOptions, field: str, width: int) -> None:
        o = options
        for name in ("heads", "kv_heads", "head_dim"):
            at_least(f"{field}.{name}", getattr(o, name), 1)
        for name in ("rope_theta", "window", "soft_cap"):
            at_least(f"{field}.{name}", getattr(o, name), 0)
        if o.heads % o.kv_heads:
            raise BadInput(f"config.{field}.kv_heads", o.kv_heads, f"must divide heads = {o.heads}")
        if o.qk_norm_full and not o.qk_norm:
            raise BadInput(f"config.{field}.qk_norm_full", True, "needs qk_norm")
        if o.rope_theta and o.head_dim % 2:
            raise BadInput(f"config.{field}.head_dim", o.head_dim, "must be even to be rotated (or rope_theta = 0)")

    @staticmethod
    def tensors(spec: Spec, options: AttentionOptions) -> dict[str, Tensor]:
        o, D = options, spec.width
        H, Hk, d = o.heads, o.kv_heads, o.head_dim
        tensors = {
            "q": Tensor((D, H, d), "hidden", fan_in=D),
            "k": Tensor((D, Hk, d), "hidden", fan_in=D),
            "v": Tensor((D, Hk, d), "hidden", fan_in=D),
            "out": Tensor((H, d, D), "hidden", fan_in=H * d, residual=True),
        }
        if o.bias or o.qkv_bias:
            for name, shape in {"q": (H, d), "k": (Hk, d), "v": (Hk, d)}.items():
                tensors[f"{name}_bias"] = Tensor(shape, "vector")
        if o.bias:
            tensors["out_bias"] = Tensor((D,), "vector")
        if o.qk_norm:  # one gain over d, shared by the heads (Qwen3), or one over all of them (OLMo 2)
            for name, heads in {"q": H, "k": Hk}.items():
                width = heads * d if o.qk_norm_full else d
                tensors[f"{name}_norm"] = Tensor((width,), "vector", fill=1.0)
        if spec.streams > 1:
            shape = (spec.streams, spec.stream_prefix, Hk, d)
            tensors |= {f"prefix_{name}": Tensor(shape, "vector", start=parscale.start) for name in "kv"}
        return tensors

    @staticmethod
    def flops(spec: Spec, options: AttentionOptions, seq_len: int) -> Flops:
        o, T = options, seq_len
        w = min(o.window or T, T)
        prefix = spec.stream_prefix if spec.streams > 1 else 0
        keys = (w * (w + 1) / 2 + (T - w) * w) / T + prefix  # that the average query sees
        projections = 4 * spec.width * o.head_dim * (o.heads + o.kv_heads)
        return Flops(
            projections + 4 * o.heads * o.head_dim * keys,
            projections + 4 * o.heads * o.head_dim * (T + prefix),
        )

    @staticmethod
    def decode_flops(spec: Spec, options: AttentionOptions, context: int) -> float:
        """Of one new token that sees `context` tokens, itself included."""
        o, keys = options, min(options.window or context, context) + (spec.stream_prefix if spec.streams > 1 else 0)
        return 4 * spec.width * o.head_dim * (o.heads + o.kv_heads) + 4 * o.heads * o.head_dim * keys

    @staticmethod
    def state_bytes(spec: Spec, options: AttentionOptions, length: int, dtype_bytes: int) -> int:
        """Keys and values of one stream of one sequence; prefixes are parameters, held once."""
        return 2 * options.kv_heads * options.head_dim * min(options.window or length, length) * dtype_bytes

    # -------------------------------------------------------------------------------- the module

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        """x -> (y, state after x, no auxiliary values). With a state, x continues what the state has seen; without
        segment ids it continues the state's last document."""
        o = self.options
        q, k, v = (self._project(x, name) for name in "qkv")
        if o.qk_norm:
            q, k = self._qk_norm(q, "q_norm"), self._qk_norm(k, "k_norm")
        if o.rope_theta:
            q, k = rope(q, positions, o.rope_theta), rope(k, positions, o.rope_theta)
        mask = None
        if state is not None:
            state, k, v, mask = self._with_cache(state, k, v, segment_ids)
        prefix = self.spec.stream_prefix if self.spec.streams > 1 else 0
        if prefix:
            rows = x.shape[0]
            k, v = (
                jnp.concatenate([parscale.per_row(self.weight(f"prefix_{name}"), rows), a], axis=1)
                for name, a in (("k", k), ("v", v))
            )
        if mask is None:
            run = self.per_row(attention.attention, window=o.window, cap=o.soft_cap, scale=self._scale())
            y = run(q, k, v, segment_ids)
        else:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (prefix, 0)), constant_values=True)
            y = attention.cached(q, k, v, mask, cap=o.soft_cap, scale=self._scale(), kernels=self.spec.kernels)
        y = linear(y.reshape(*y.shape[:2], -1), self.weight("out").reshape(-1, x.shape[-1]))
        return (y + self.weight("out_bias") if o.bias else y), state, {}

    def _project(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T H d"]:
        y = linear(x, self.weight(name))
        return y + self.weight(f"{name}_bias") if self.options.bias or self.options.qkv_bias else y

    def _scale(self) -> float:
        """Of the scores: 1 / sqrt(d), under muP sqrt(d_base) / d."""
        d = self.options.head_dim
        return d**-0.5 * (1.0 if self.base is None else self.base.head_dim / d) ** 0.5

    def _qk_norm(self, x: Float[Array, "B T H d"], name: str) -> Float[Array, "B T H d"]:
        rows = x.reshape(*x.shape[:2], -1) if self.options.qk_norm_full else x
        return rms_norm(rows, self.weight(name), self.spec.norm_eps).reshape(x.shape)

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        """An empty cache of min(window, max_len) keys (rotated) and values: a ring, slot = index mod its length.

        Past max_len tokens, the oldest are forgotten.
        """
        o = self.options
        S = min(o.window or max_len, max_len)
        entry = jnp.zeros((batch, S, o.kv_heads, o.head_dim), self.spec.dtype)
        segments = jnp.zeros((batch, S), jnp.int32)
        return {"k": entry, "v": entry, "segment_ids": segments, "length": jnp.zeros((), jnp.int32)}

    def step(self, x_t: Float[Array, "B D"], state: dict[str, Array]) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        """One token, at the position that the state has reached, in the state's last document."""
        y, state_after, _ = self(x_t[:, None], None, state["length"][None, None], state)
        assert state_after is not None
        return y[:, 0], state_after

    def _with_cache(
        self, state: dict[str, Array], k: Array, v: Array, segment_ids: Array | None
    ) -> tuple[dict[str, Array], Array, Array, Bool[Array, "B T K"]]:
        """The state with the new keys in, all keys and values (old, then new), and which of them each query sees."""
        (B, T), S, length = k.shape[:2], state["k"].shape[1], state["length"]
        if segment_ids is None:
            last = jax.lax.dynamic_index_in_dim(state["segment_ids"], (length - 1) % S, axis=1)
            segment_ids = jnp.broadcast_to(last, (B, T))
        new = {"k": k, "v": v, "segment_ids": segment_ids}
        slot = jnp.arange(S)
        old_index = length - 1 - (length - 1 - slot) % S  # of the token in each slot; negative: none yet
        index = length + jnp.arange(T)
        key_index = jnp.concatenate([old_index, index])
        both = {name: jnp.concatenate([state[name], new[name]], axis=1) for name in new}
        mask = visible(index, key_index, self.options.window)[None] & (key_index >= 0)
        mask &= segment_ids[:, :, None] == both["segment_ids"][:, None, :]
        kept = min(T, S)
        after = {name: state[name].at[:, index[-kept:] % S].set(new[name][:, -kept:]) for name in new}
        return after | {"length": length + T}, both["k"], both["v"], mask
