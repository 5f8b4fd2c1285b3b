"""Mixture of experts: every token goes through the k of Ne small SwiGLU MLPs that a router picks (token choice).

    logits = x W_r                                       float32
    softmax:  p = softmax(logits), the k largest; w = p of those, divided by their sum if `normalise`
    sigmoid:  s = sigma(logits), the k largest of s + bias; w = s of those, likewise
    y = scale * sum_{e of the k} w_e Expert_e(x)  +  one MLP of width shared * Fe, the shared experts

The bias only selects; weights, and with them the router's gradient, come from the unbiased scores. k = 1 is never
renormalised: the router would get no gradient. With `groups`, only the experts of the `top_groups` best of that many
groups compete; a group is as good as its two best experts together (DeepSeek-V3).

Dropless by default: rows are sorted by expert into tiles (`pallas_kernels.grouped_matmul`). With `capacity`, in
training, an expert takes at most ceil(capacity * T k / Ne) tokens of each sequence, first choices before second ones,
earlier tokens before later ones (the dispatch group and the priority are choices; Switch and GShard have these); a
choice that finds no room contributes nothing and the other weights stay as they are. Evaluation drops nothing.

Balance. Over a set S of tokens, c_e choices of expert e, f_e = c_e / (|S| k), P_e the mean of the probabilities
(sigmoid: scores normalised to sum 1 per token):  LBL = Ne sum_e f_e P_e, 1 at balance, Ne / k at collapse; gradient
through P alone. `lbl_scope` is what S is: each `sequence`; each `micro_batch` of `lbl_sequences` sequences that lie
next to each other in the batch; the `global` batch, over all devices and accumulation steps: LBL is linear in P, so a
part of the batch needs of the rest only c (Qiu et al. 2025, arXiv 2501.11873), which the training step counts first,
in a forward pass over all parts of its own, where there is more than one. Choices count before any are dropped.
z_loss adds mean(logsumexp(logits)^2) (ST-MoE). `bias_rate` u > 0 keeps a bias for selection, moved after each
optimiser step by u sign(mean(c) - c_e) with the counts of the global batch, `bias_centred` without the mean of the
signs (Wang et al. 2024, arXiv 2408.15664; centred: Ling 2.0).

Sources: Shazeer et al. 2017, Fedus et al. 2021 (arXiv 2101.03961), Zoph et al. 2022 (arXiv 2202.08906), DeepSeek-V3
(arXiv 2412.19437).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import grouped_matmul as gmm
from scalelab.errors import BadInput
from scalelab.models.layers import full_product, linear
from scalelab.models.mlp import swiglu
from scalelab.models.part import ChannelMixer
from scalelab.models.spec import Flops, Spec
from scalelab.parametrization import Tensor
from scalelab.schema import at_least, choice

F32 = jnp.float32
SCOPES = ("sequence", "micro_batch", "global")


@dataclasses.dataclass(frozen=True)
class MoEOptions:
    """See `schema.LATER_SECTIONS`."""

    experts: int
    top_k: int
    hidden: int
    shared: int
    router: str
    normalise: bool
    scale: float
    groups: int
    top_groups: int
    capacity: float
    lbl: float
    lbl_scope: str
    lbl_sequences: int
    z_loss: float
    bias_rate: float
    bias_centred: bool


class MoE(ChannelMixer):
    Options = MoEOptions
    grows = ("hidden",)
    bias: nnx.Param

    # -------------------------------------------------------------------------------- pure functions of the config

    @staticmethod
    def check(options: MoEOptions, field: str, width: int) -> None:
        o = options
        for name in ("experts", "top_k", "hidden", "groups", "top_groups", "lbl_sequences"):
            at_least(f"{field}.{name}", getattr(o, name), 1)
        for name in ("shared", "capacity", "lbl", "z_loss", "bias_rate"):
            at_least(f"{field}.{name}", getattr(o, name), 0)
        at_least(f"{field}.scale", o.scale, 0, above=True)
        choice(f"{field}.router", o.router, ("softmax", "sigmoid"))
        choice(f"{field}.lbl_scope", o.lbl_scope, SCOPES)
        if o.experts % o.groups or (o.groups > 1 and o.experts // o.groups < 2):
            raise BadInput(f"config.{field}.groups", o.groups, f"must cut {o.experts} experts into equal parts of >= 2")
        if o.top_groups > o.groups:
            raise BadInput(f"config.{field}.top_groups", o.top_groups, f"must be at most groups = {o.groups}")
        compete = o.experts // o.groups * o.top_groups
        if o.top_k > compete:
            raise BadInput(f"config.{field}.top_k", o.top_k, f"must be at most the {compete} experts that compete")

    @staticmethod
    def tensors(spec: Spec, options: MoEOptions) -> dict[str, Tensor]:
        o, D, Ne, Fe = options, spec.width, options.experts, options.hidden
        active = o.top_k * D * Fe
        tensors = {
            "router": Tensor((D, Ne), "gate", fan_in=D),
            "gate": Tensor((Ne, D, Fe), "hidden", fan_in=D, active=active),
            "up": Tensor((Ne, D, Fe), "hidden", fan_in=D, active=active),
            "down": Tensor((Ne, Fe, D), "hidden", fan_in=Fe, residual=True, active=active),
        }
        if o.shared:
            inner = o.shared * Fe
            tensors |= {
                "shared_gate": Tensor((D, inner), "hidden", fan_in=D),
                "shared_up": Tensor((D, inner), "hidden", fan_in=D),
                "shared_down": Tensor((inner, D), "hidden", fan_in=inner, residual=True),
            }
        return tensors | {"bias": Tensor((Ne,), "buffer")} if o.bias_rate else tensors

    @staticmethod
    def flops(spec: Spec, options: MoEOptions, tokens: int = 1) -> Flops:
        """Dropless, whatever the balance; with a capacity the choices that are dropped are counted as if they were
        not. As run: tiles padded for the worst case of `tokens` tokens."""
        o = options
        expert, always = 6 * spec.width * o.hidden, 2 * spec.width * o.experts
        always += o.shared * expert
        rows = gmm.padded_rows(tokens * o.top_k, o.experts)
        return Flops(always + o.top_k * expert, always + expert * rows / tokens)

    # -------------------------------------------------------------------------------- the module

    def __call__(self, x: Float[Array, "*b D"]) -> tuple[Float[Array, "*b D"], dict[str, Any]]:
        """x -> (y, aux). Of x (B, T, D) the aux is "loss" and, summed over tokens, "counts" (choices of each expert),
        "probabilities", "entropy" of the router, and "dropped" choices. Of x (B, D), one token each: no aux."""
        o, spec = self.options, self.spec
        logits, chosen, w = self._route(x)
        aux, kept = {}, chosen
        if x.ndim == 3:
            aux = self._statistics(logits, chosen)
            if o.capacity and spec.training:
                kept = within_capacity(chosen, o.experts, o.capacity)
            aux["dropped"] = jnp.sum(kept == o.experts, dtype=F32)
        matrices = (self.weight(name) for name in ("gate", "up", "down"))
        y = self.per_row(experts, shared=(3, 4, 5))(x, kept, w, *matrices)  # every device sorts its own tokens
        if o.shared:
            h = swiglu(linear(x, self.weight("shared_gate")), linear(x, self.weight("shared_up")))
            y = y + linear(h, self.weight("shared_down"))
        return y.astype(x.dtype), aux

    def _route(self, x: Array) -> tuple[Float[Array, "*b Ne"], Int[Array, "*b k"], Float[Array, "*b k"]]:
        """(logits, the chosen experts, best first, their weights)."""
        o = self.options
        logits = full_product(x, self.exact("router"))
        scores = jax.nn.softmax(logits) if o.router == "softmax" else jax.nn.sigmoid(logits)
        by = jax.lax.stop_gradient(scores)
        if o.bias_rate:
            by = by + jax.lax.stop_gradient(self.exact("bias"))
        if o.groups > o.top_groups:
            by = jnp.where(self._competing(by), by, -jnp.inf)
        chosen = top(by, o.top_k)
        # A masked sum: its gradient, unlike that of a gather, is no scatter.
        w = jnp.sum(jnp.where(one_hot(chosen, o.experts), scores[..., None, :], 0.0), axis=-1)
        if o.normalise and o.top_k > 1:
            w = w / jnp.sum(w, axis=-1, keepdims=True)
        return logits, chosen, o.scale * w

    def _competing(self, scores: Float[Array, "*b Ne"]) -> Bool[Array, "*b Ne"]:
        o = self.options
        by_group = scores.reshape(*scores.shape[:-1], o.groups, -1)
        best = jnp.sum(jnp.sort(by_group, axis=-1)[..., -2:], axis=-1)
        stay = jnp.any(one_hot(top(best, o.top_groups), o.groups), axis=-2)
        return jnp.broadcast_to(stay[..., None], by_group.shape).reshape(scores.shape)

    def _statistics(self, logits: Float[Array, "B T Ne"], chosen: Int[Array, "B T k"]) -> dict[str, Array]:
        o = self.options
        B, _, Ne = logits.shape
        if o.router == "softmax":
            p = jax.nn.softmax(logits)
        else:
            p = jax.nn.sigmoid(logits)
            p = p / jnp.sum(p, axis=-1, keepdims=True)
        counts = jnp.sum(one_hot(chosen, Ne), axis=(1, 2), dtype=F32)  # of each sequence
        probabilities = jnp.sum(p, axis=1)
        group = {"sequence": 1, "micro_batch": o.lbl_sequences * self.spec.streams, "global": B}[o.lbl_scope]
        if B % group:
            if self.spec.training:
                raise BadInput("config.model.moe.lbl_sequences", group, f"must divide the {B} sequences of a pass")
            group = B  # no one reads the loss of a pass that scores
        # The mean over sets of tokens of Ne sum_e f_e P_e.
        c, P = (jnp.sum(a.reshape(-1, group, Ne), axis=1) for a in (counts, probabilities))
        loss = o.lbl * jnp.mean(balance(c, P, o.top_k))
        loss += o.z_loss * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(F32).tiny)))
        return {
            "loss": loss,
            "counts": jnp.sum(counts, axis=0),
            "probabilities": jnp.sum(probabilities, axis=0),
            "entropy": jax.lax.stop_gradient(entropy),
        }

    # -------------------------------------------------------------------------------- what the training step asks

    @staticmethod
    def joint(options: MoEOptions) -> bool:
        return options.lbl_scope == "global" and options.lbl > 0

    @staticmethod
    def rest_of_loss(options: MoEOptions, seen: dict[str, Array], whole: dict[str, Array]) -> Array:
        """The balance loss with the choices of the whole batch in place of this part's."""
        if not MoE.joint(options):
            return jnp.zeros((), F32)
        own, P = (seen[name] for name in ("counts", "probabilities"))
        share = jnp.sum(own, axis=-1, keepdims=True) / jnp.sum(whole["counts"], axis=-1, keepdims=True)
        return options.lbl * jnp.sum(balance(share * whole["counts"] - own, P, options.top_k, total=jnp.sum(own, -1)))

    @staticmethod
    def after_step(options: MoEOptions, params: dict[str, Array], counters: dict[str, Array]) -> dict[str, Array]:
        """The selection bias, moved towards balance."""
        if not options.bias_rate:
            return {}
        c = counters["counts"]
        sign = jnp.sign(jnp.mean(c, axis=-1, keepdims=True) - c)
        if options.bias_centred:
            sign = sign - jnp.mean(sign, axis=-1, keepdims=True)
        return {"bias": params["bias"] + options.bias_rate * sign}

    @staticmethod
    def summary(options: MoEOptions, counters: dict[str, Array]) -> dict[str, Array]:
        """Of each layer: "balance" (LBL over the whole batch), "router_entropy" (mean over tokens) and "load_entropy"
        in nats, "max_violation" max_e c_e / mean(c) - 1, "drop_rate", and "load", each expert's share of choices."""
        c = counters["counts"]
        choices = jnp.sum(c, axis=-1)
        f = c / choices[..., None]
        return {
            "balance": balance(c, counters["probabilities"], options.top_k),
            "router_entropy": counters["entropy"] / choices * options.top_k,
            "load_entropy": -jnp.sum(f * jnp.log(jnp.maximum(f, jnp.finfo(F32).tiny)), axis=-1),
            "max_violation": jnp.max(f, axis=-1) * options.experts - 1,
            "drop_rate": counters["dropped"] / choices,
            "load": f,
        }


def experts(
    x: Float[Array, "*b D"],
    chosen: Int[Array, "*b k"],
    w: Float[Array, "*b k"],
    gate: Float[Array, "Ne D Fe"],
    up: Float[Array, "Ne D Fe"],
    down: Float[Array, "Ne Fe D"],
    *,
    kernels: str,
) -> Float[Array, "*b D"]:
    """sum_e w_e Expert_e(x), float32: the weights go into the last product. A choice of expert Ne is none."""
    flat = x.reshape(-1, x.shape[-1])
    form = gmm.choose(flat, down.swapaxes(1, 2), kernels)
    plan = gmm.layout(chosen.reshape(-1), len(up), gmm.tile_height(chosen.size, len(up), form))
    rows, weights = gmm.spread(flat, plan, form), gmm.spread_numbers(w.reshape(-1), plan)
    # One product for both: it reads the rows once, and writes their gradient once.
    both = gmm.grouped_matmul(rows, jnp.concatenate([gate, up], axis=2), plan.group, kernels=form)
    out = gmm.grouped_matmul(gmm.weighted_swiglu(both, weights, form), down, plan.group, kernels=form)
    return gmm.collect(out, plan, chosen.shape[-1], form).reshape(x.shape)


def top(scores: Float[Array, "*b n"], k: int) -> Int[Array, "*b k"]:
    """The k best, best first, of equal ones the first. `lax.top_k` would fetch the rows of all devices."""
    chosen = []
    for _ in range(k):
        chosen.append(jnp.argmax(scores, axis=-1))
        scores = jnp.where(one_hot(chosen[-1], scores.shape[-1]), -jnp.inf, scores)
    return jnp.stack(chosen, axis=-1)


def one_hot(index: Int[Array, "*b"], n: int) -> Bool[Array, "*b n"]:
    return index[..., None] == jnp.arange(n)


def balance(counts: Array, probabilities: Array, k: int, total: Array | None = None) -> Array:
    """Ne sum_e f_e P_e from sums over tokens: choices and probabilities (..., Ne). `total`: choices that there are, if
    not the sum of `counts`."""
    total = jnp.sum(counts, axis=-1) if total is None else total
    return counts.shape[-1] * k * jnp.sum(jax.lax.stop_gradient(counts) * probabilities, axis=-1) / total**2


def within_capacity(chosen: Int[Array, "B T k"], experts: int, capacity: float) -> Int[Array, "B T k"]:
    """The choices that find room, in each sequence by itself; the others become expert Ne, which is none."""
    B, T, k = chosen.shape
    room = math.ceil(capacity * T * k / experts)
    by_slot = chosen.swapaxes(1, 2).reshape(B, k * T)
    rank = jax.vmap(lambda row: gmm.ranks(row, experts)[0])(by_slot)
    return jnp.where(rank < room, by_slot, experts).reshape(B, k, T).swapaxes(1, 2)
