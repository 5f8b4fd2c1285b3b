"""xLSTM's mLSTM mixers: that of the large models (Beck et al. 2025, arXiv 2503.13427) and that of the paper (Beck et
al. 2024, arXiv 2405.04517). The cell is `pallas_kernels.mlstm`; sLSTM is in `slstm.py`.

mlstm      q, k = x Wq, x Wk (D -> D / 2);  v = x Wv;  o = sigma(x Wo);  i, f = cap(x Wi + bi), cap(x Wf + bf)
           out = (o * norm(cell(q, k, v, i, f))) Wout
mlstm_up   (u, z) = x Wup;  c = silu(conv(u));  q, k = BD(c), BD(c);  v = BD(u);  i, f from concat(q, k, v)
           out = ((norm(cell) + skip * c) * silu(z)) Wdown

BD is block-diagonal with blocks of 4 channels. norm is LayerNorm inside each head without bias, one gain per channel.
Gates are computed in float32. Initialisation as published whatever `model.init` says: small N(0, 2 / (5 D)), outputs
N(0, (2 / (L sqrt(D)))^2) with L blocks, gates and Wo zero, bf = linspace(3, 6) over heads, bi = -10 (mlstm) or
N(0, 0.1) (mlstm_up).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import mlstm
from scalelab.errors import BadInput
from scalelab.models.layers import full_product, linear, linears, pointwise, soft_cap
from scalelab.models.part import Mixer
from scalelab.models.sequence import beginnings, no_past, short_conv
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Depth, Tensor, constant, uniform
from scalelab.schema import at_least

BLOCK = 4  # channels of a block of the block-diagonal maps


def small(width: int) -> Any:
    return lambda z, depth: math.sqrt(2 / (5 * width)) * z


def wang(width: int) -> Any:
    return lambda z, depth: 2 / (depth.layers * math.sqrt(width)) * z


zero = constant(0.0)


def cell_flops(heads: int, dk: int, dv: int, chunk: int, seq_len: int) -> Flops:
    """Of the mLSTM cell, per token; dk and dv are those of one head."""
    Q = min(chunk, seq_len)
    c = (Q + 1) / 2
    exact = heads * (2 * (dk + dv) * c + 4 * dk * dv + 2 * dk * dv / Q + 4 * dk)
    padded = -(-seq_len // Q) * Q / seq_len
    return Flops(exact, padded * heads * (2 * (dk + dv) * Q + 4 * dk * dv))


def cell_step_flops(heads: int, dk: int, dv: int) -> float:
    """Decay, add and read C (5 dk dv) and n (5 dk)."""
    return heads * (5 * dk * dv + 5 * dk)


def empty_cell(batch: int, heads: int, dk: int, dv: int) -> dict[str, Array]:
    return {
        "C": jnp.zeros((batch, heads, dk, dv), jnp.float32),
        "n": jnp.zeros((batch, heads, dk), jnp.float32),
        "m": jnp.full((batch, heads), -1e30, jnp.float32),
    }


def head_norm(h: Float[Array, "B T H d"], gain: Float[Array, " H*d"], eps: float) -> Float[Array, "B T H*d"]:
    """LayerNorm inside each head, no bias, a gain per channel; float32 inside."""

    @pointwise
    def norm(h: Array, gain: Array) -> Array:
        y = h.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        return (y.reshape(*y.shape[:-2], -1) * gain).astype(h.dtype)

    return norm(h, gain)


@dataclasses.dataclass(frozen=True)
class MLSTMOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    qk_factor: float
    gate_cap: float
    chunk: int


class MLSTM(Mixer):
    """The post-up-projection block's mixer; a SwiGLU channel mixer goes with it."""

    Options = MLSTMOptions
    grows = ("heads",)

    @staticmethod
    def check(options: MLSTMOptions, field: str, width: int) -> None:
        o = options
        at_least(f"{field}.heads", o.heads, 1)
        at_least(f"{field}.chunk", o.chunk, 1)
        at_least(f"{field}.gate_cap", o.gate_cap, 0)
        at_least(f"{field}.qk_factor", o.qk_factor, 0, above=True)
        if width % o.heads:
            raise BadInput(f"config.{field}.heads", o.heads, f"must divide the width {width}")
        if (o.qk_factor * width) % o.heads:
            remedy = f"times the width {width} must be a multiple of the {o.heads} heads"
            raise BadInput(f"config.{field}.qk_factor", o.qk_factor, remedy)

    @staticmethod
    def sizes(spec: Spec, options: MLSTMOptions) -> tuple[int, int]:
        """(dk, dv) of a head."""
        return int(options.qk_factor * spec.width) // options.heads, spec.width // options.heads

    @staticmethod
    def tensors(spec: Spec, options: MLSTMOptions) -> dict[str, Tensor]:
        D, H = spec.width, options.heads
        dk, dv = MLSTM.sizes(spec, options)
        return {
            "q": Tensor((D, H, dk), "hidden", fan_in=D, start=small(D)),
            "k": Tensor((D, H, dk), "hidden", fan_in=D, start=small(D)),
            "v": Tensor((D, H, dv), "hidden", fan_in=D, start=small(D)),
            "o": Tensor((D, D), "hidden", fan_in=D, start=zero),
            "i": Tensor((D, H), "gate", fan_in=D, start=zero),
            "f": Tensor((D, H), "gate", fan_in=D, start=zero),
            "i_bias": Tensor((H,), "vector", fill=-10.0),
            "f_bias": Tensor((H,), "vector", start=constant(np.linspace(3.0, 6.0, H))),
            "norm": Tensor((D,), "vector", fill=1.0),
            "out": Tensor((D, D), "hidden", fan_in=D, residual=True, start=wang(D)),
        }

    @staticmethod
    def _matrices(spec: Spec, options: MLSTMOptions) -> float:
        D, H = spec.width, options.heads
        dk, dv = MLSTM.sizes(spec, options)
        return 2 * D * 2 * H * dk + 2 * D * 2 * H * dv + 2 * H * dv * D + 2 * D * 2 * H

    @staticmethod
    def flops(spec: Spec, options: MLSTMOptions, seq_len: int) -> Flops:
        matrices = MLSTM._matrices(spec, options)
        cell = cell_flops(options.heads, *MLSTM.sizes(spec, options), options.chunk, seq_len)
        return Flops(matrices + cell.exact, matrices + cell.matmul)

    @staticmethod
    def decode_flops(spec: Spec, options: MLSTMOptions, context: int) -> float:
        return MLSTM._matrices(spec, options) + cell_step_flops(options.heads, *MLSTM.sizes(spec, options))

    @staticmethod
    def state_bytes(spec: Spec, options: MLSTMOptions, length: int, dtype_bytes: int) -> int:
        dk, dv = MLSTM.sizes(spec, options)
        return options.heads * (dk * dv + dk + 1) * 4

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        q, k, v = (linear(x, self.weight(name)) for name in "qkv")
        i, f = (self._gate(x, name) for name in "if")
        h, after = run_cell(self.per_row(mlstm.mlstm, chunk=self.options.chunk), q, k, v, i, f, state, segment_ids)
        h = head_norm(h, self.exact("norm"), self.spec.norm_eps)
        y = output_gate(linear(x, self.weight("o")), h)
        return linear(y, self.weight("out")), after, {}

    def _gate(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T H"]:
        raw = full_product(x, self.exact(name)) + self.exact(f"{name}_bias")
        return soft_cap(raw, self.options.gate_cap)

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        cell = empty_cell(batch, self.options.heads, *self.sizes(self.spec, self.options))
        return cell | {"segment": jnp.zeros((batch,), jnp.int32)}


@pointwise
def output_gate(o: Array, h: Array) -> Array:
    return jax.nn.sigmoid(o) * h


def run_cell(
    cell: Callable[..., Any], q: Array, k: Array, v: Array, i: Array, f: Array,
    state: dict[str, Array] | None, segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T H dv"], dict[str, Array] | None]:  # fmt: skip
    """The cell (`mlstm.mlstm`, as a pass wants it run) over a piece of text, and the state after it where there was one
    before."""
    before = None if state is None else mlstm.State(state["C"], state["n"], state["m"])
    reset = beginnings(segment_ids, None if state is None else state["segment"])
    h, after = cell(q, k, v, i, f, before, reset)
    if state is None:
        return h, None
    return h, {**after._asdict(), "segment": state["segment"] if segment_ids is None else segment_ids[:, -1]}


# ------------------------------------------------------------------------------------------- the paper's block


@dataclasses.dataclass(frozen=True)
class MLSTMUpOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    expand: int
    conv: int
    chunk: int


class MLSTMUp(Mixer):
    """The pre-up-projection block: no channel mixer goes with it."""

    Options = MLSTMUpOptions
    grows = ("heads",)

    @staticmethod
    def check(options: MLSTMUpOptions, field: str, width: int) -> None:
        for name in ("heads", "expand", "conv", "chunk"):
            at_least(f"{field}.{name}", getattr(options, name), 1)
        E = options.expand * width
        if E % options.heads or E % BLOCK:
            raise BadInput(f"config.{field}.heads", options.heads, f"and {BLOCK} must divide the inner width {E}")

    @staticmethod
    def tensors(spec: Spec, options: MLSTMUpOptions) -> dict[str, Tensor]:
        D, K, H = spec.width, options.conv, options.heads
        E = options.expand * D
        blocks = (E // BLOCK, BLOCK, BLOCK)
        return {
            "up": Tensor((D, 2 * E), "hidden", fan_in=D, start=small(D)),
            "conv": Tensor((K, E), "vector", start=uniform(K**-0.5)),
            "conv_bias": Tensor((E,), "vector", start=uniform(K**-0.5)),
            # block-diagonal: their fan-in does not grow with the width
            **{name: Tensor(blocks, "hidden", fan_in=BLOCK, start=small(D)) for name in "qkv"},
            "i": Tensor((3 * E, H), "gate", fan_in=3 * E, start=zero),
            "f": Tensor((3 * E, H), "gate", fan_in=3 * E, start=zero),
            "i_bias": Tensor((H,), "vector", start=lambda z, depth: 0.1 * z),
            "f_bias": Tensor((H,), "vector", start=constant(np.linspace(3.0, 6.0, H))),
            "norm": Tensor((E,), "vector", fill=1.0),
            "skip": Tensor((E,), "vector", fill=1.0),
            "down": Tensor((E, D), "hidden", fan_in=E, residual=True, start=wang(D)),
        }

    @staticmethod
    def _matrices(spec: Spec, options: MLSTMUpOptions) -> float:
        D, E = spec.width, options.expand * spec.width
        return 2 * D * 2 * E + 3 * 2 * E * BLOCK + 2 * 3 * E * 2 * options.heads + 2 * E * D

    @staticmethod
    def flops(spec: Spec, options: MLSTMUpOptions, seq_len: int) -> Flops:
        E, H = options.expand * spec.width, options.heads
        matrices = MLSTMUp._matrices(spec, options)
        cell = cell_flops(H, E // H, E // H, options.chunk, seq_len)
        return Flops(matrices + 2 * options.conv * E + cell.exact, matrices + cell.matmul)

    @staticmethod
    def decode_flops(spec: Spec, options: MLSTMUpOptions, context: int) -> float:
        E, H = options.expand * spec.width, options.heads
        return MLSTMUp._matrices(spec, options) + 2 * options.conv * E + cell_step_flops(H, E // H, E // H)

    @staticmethod
    def state_bytes(spec: Spec, options: MLSTMUpOptions, length: int, dtype_bytes: int) -> int:
        E, H = options.expand * spec.width, options.heads
        d = E // H
        return H * (d * d + d + 1) * 4 + E * (options.conv - 1) * dtype_bytes

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        o, (B, T, D) = self.options, x.shape
        E, H = o.expand * D, o.heads
        before = state or self.init_state(B, T)
        u, z = linears(x, self.weight("up"), E, E)
        (c,), past, past_segments = short_conv(
            [u], self.exact("conv"), self.exact("conv_bias"), before["conv"], segment_ids, before["conv_segments"],
            self.per_row,
        )  # fmt: skip
        q, k, v = (block_diagonal(a, self.weight(name)) for a, name in ((c, "q"), (c, "k"), (u, "v")))
        qkv = jnp.concatenate([q, k, v], axis=-1)
        i, f = (full_product(qkv, self.exact(name)) + self.exact(f"{name}_bias") for name in "if")
        q, k, v = (a.reshape(B, T, H, E // H) for a in (q, k, v))
        h, after = run_cell(self.per_row(mlstm.mlstm, chunk=o.chunk), q, k, v, i, f, state, segment_ids)
        if after is not None:
            after |= {"conv": past, "conv_segments": past_segments}
        h = head_norm(h, self.exact("norm"), self.spec.norm_eps)
        y = skip_and_gate(h, c, z, self.weight("skip"))
        return linear(y, self.weight("down")), after, {}

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        o = self.options
        E, H = o.expand * self.spec.width, o.heads
        past, past_segments = no_past(batch, o.conv, E, self.spec.dtype)
        state = empty_cell(batch, H, E // H, E // H) | {"conv": past, "conv_segments": past_segments}
        return state | {"segment": jnp.zeros((batch,), jnp.int32)}


def block_diagonal(x: Float[Array, "B T E"], w: Float[Array, "n b b"]) -> Float[Array, "B T E"]:
    """Every b channels by a matrix of their own."""
    blocks = x.reshape(*x.shape[:-1], *w.shape[:2])
    return jnp.einsum("btni,nij->btnj", blocks, w).reshape(x.shape)


@pointwise
def skip_and_gate(h: Array, c: Array, z: Array, skip: Array) -> Array:
    return (h + skip * c) * jax.nn.silu(z)


def forget_bias(heads: int) -> Any:
    """sLSTM's forget bias in channel j of a head of block l: 5 - 12 (j / (d - 1))^(0.3 + 1.3 l / (L - 1))."""

    def start(z: Array, depth: Depth) -> Array:
        d = z.shape[-1] // heads
        place = jnp.arange(d) / max(1, d - 1)
        power = 0.3 + 1.3 * depth.layer / max(1, depth.layers - 1)
        return jnp.broadcast_to(jnp.tile(5 - 12 * place**power, heads), z.shape)

    return start
