"""sLSTM (Beck et al. 2024, arXiv 2405.04517): a scalar memory with recurrent gates, sequential over the tokens.

With x the block's normed input and c = silu(conv(x)); every map is head-wise, d -> d:

    i, f = c Wi, c Wf;  z, o = x Wz, x Wo;      raw_g = g_t + R_g h_{t-1} + b_g  for each of the four
    m_t = max(logsig(raw_f) + m_{t-1}, raw_i)
    c_t = exp(logsig(raw_f) + m_{t-1} - m_t) c_{t-1} + exp(raw_i - m_t) tanh(raw_z)     (n alike, with 1)
    h_t = sigma(raw_o) c_t / n_t                out = LayerNorm inside each head of h, a gain per channel

There is no parallel form (`pallas_kernels.slstm`). Gates and states are float32, the recurrent products too. R and the
biases start at zero but for the forget bias (`xlstm.forget_bias`); the maps N(0, 2 / (5 D)). A gated MLP with exact
GELU goes with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import slstm
from pallas_kernels.slstm.xla import EMPTY
from scalelab.errors import BadInput
from scalelab.models.part import Mixer
from scalelab.models.sequence import beginnings, no_past, short_conv
from scalelab.models.spec import Flops, Spec
from scalelab.models.xlstm import forget_bias, head_norm, small, zero
from scalelab.parametrization import Tensor, uniform
from scalelab.schema import at_least

GATES = "ifzo"


@dataclasses.dataclass(frozen=True)
class SLSTMOptions:
    """See `schema.LATER_SECTIONS`."""

    heads: int
    conv: int


class SLSTM(Mixer):
    Options = SLSTMOptions
    grows = ("heads",)

    # -------------------------------------------------------------------------------- pure functions of the config

    @staticmethod
    def check(options: SLSTMOptions, field: str, width: int) -> None:
        for name in ("heads", "conv"):
            at_least(f"{field}.{name}", getattr(options, name), 1)
        if width % options.heads:
            raise BadInput(f"config.{field}.heads", options.heads, f"must divide the width {width}")

    @staticmethod
    def tensors(spec: Spec, options: SLSTMOptions) -> dict[str, Tensor]:
        D, H, K = spec.width, options.heads, options.conv
        d = D // H
        maps = {gate: Tensor((H, d, d), "hidden", fan_in=d, start=small(D)) for gate in GATES}
        return {
            "conv": Tensor((K, D), "vector", start=uniform(K**-0.5)),
            "conv_bias": Tensor((D,), "vector", start=uniform(K**-0.5)),
            **maps,
            "recurrent": Tensor((4, H, d, d), "hidden", fan_in=d, start=zero, exact=True),
            **{f"{gate}_bias": Tensor((D,), "vector") for gate in "izo"},
            "f_bias": Tensor((D,), "vector", start=forget_bias(H)),
            "norm": Tensor((D,), "vector", fill=1.0, residual=True),
        }

    @staticmethod
    def flops(spec: Spec, options: SLSTMOptions, seq_len: int) -> Flops:
        D = spec.width
        matrices = 16 * D * (D // options.heads)  # 8 D d from the inputs, 8 D d recurrent
        return Flops(matrices + 2 * options.conv * D, matrices)

    @staticmethod
    def decode_flops(spec: Spec, options: SLSTMOptions, context: int) -> float:
        return SLSTM.flops(spec, options, 1).exact

    @staticmethod
    def state_bytes(spec: Spec, options: SLSTMOptions, length: int, dtype_bytes: int) -> int:
        return 4 * spec.width * 4 + spec.width * (options.conv - 1) * dtype_bytes

    # -------------------------------------------------------------------------------- the module

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        state: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, dict[str, Any]]:
        (B, T, D), H = x.shape, self.options.heads
        before = state or self.init_state(B, T)
        (c,), past, past_segments = short_conv(
            [x], self.exact("conv"), self.exact("conv_bias"), before["conv"], segment_ids, before["conv_segments"],
            self.per_row,
        )  # fmt: skip
        inputs = [
            jnp.einsum("bthd,hde->bthe", a.reshape(B, T, H, D // H), self.weight(gate)).astype(jnp.float32)
            + self.exact(f"{gate}_bias").reshape(H, D // H)
            for gate, a in zip(GATES, (c, c, x, x), strict=True)
        ]
        h, cell = self.per_row(slstm.slstm, shared=(1,))(
            jnp.stack(inputs, axis=3),
            self.exact("recurrent"),
            slstm.State(*(before[name].reshape(B, H, D // H) for name in "hcnm")),
            beginnings(segment_ids, before["segment"] if state is not None else None),
        )
        after = None
        if state is not None:
            last = before["segment"] if segment_ids is None else segment_ids[:, -1]
            after = {name: a.reshape(B, D) for name, a in cell._asdict().items()}
            after |= {"conv": past, "conv_segments": past_segments, "segment": last}
        return head_norm(h.astype(x.dtype), self.exact("norm"), self.spec.norm_eps), after, {}

    def init_state(self, batch: int, max_len: int) -> dict[str, Array]:
        D = self.spec.width
        past, past_segments = no_past(batch, self.options.conv, D, self.spec.dtype)
        empty = jnp.zeros((batch, D), jnp.float32)
        state = {"h": empty, "c": empty, "n": empty, "m": jnp.full((batch, D), EMPTY, jnp.float32)}
        return state | {"conv": past, "conv_segments": past_segments, "segment": jnp.zeros((batch,), jnp.int32)}
