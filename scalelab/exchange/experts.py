"""Attention and mixtures of experts: Mixtral and Qwen 3 MoE, softmax routers without a selection bias."""

from __future__ import annotations

from typing import Any

from scalelab.exchange.decoders import (
    ATTENTION,
    MLP,
    PRE_NORMS,
    QK_NORM,
    llama_like,
    read_attention,
    read_window,
    write_attention,
)
from scalelab.exchange.layout import Ours, Piece, Theirs, matrix, stack

SOFTMAX = {
    "moe.router": "softmax", "moe.scale": 1.0, "moe.shared": 0, "moe.groups": 1, "moe.bias_rate": 0.0,
    "mlp.kind": "swiglu",
}  # fmt: skip
SAME = {"moe.top_k": "num_experts_per_tok"}


def pieces(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Piece, ...]:
    """One file tensor for each expert, which `expert` counts with its braces."""
    stacked = (("gate", gate), ("up", up), ("down", down))
    return (
        matrix(router, "channel.router"),
        *(Piece(f"{expert}.{theirs}.weight", (f"channel.{ours}",), "experts") for ours, theirs in stacked),
    )


def _mixtral_read(theirs: Theirs) -> dict[str, Any]:
    if theirs.whole("num_experts_per_tok") == 1:
        raise theirs.refuse("num_experts_per_tok", "cannot be expressed: the weight of a single expert is not made 1")
    return {**read_attention(theirs), "attention.window": read_window(theirs)}


def _mixtral_write(ours: Ours) -> dict[str, Any]:
    if ours["moe.top_k"] == 1:
        raise ours.refuse("moe.top_k", "cannot be exported: MixtralForCausalLM makes the weight of a single expert 1")
    return {**write_attention(ours), "sliding_window": ours["attention.window"] or None}


MIXTRAL = llama_like(
    "mixtral",
    "MixtralForCausalLM",
    channels={"moe": pieces("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{}", "w1", "w3", "w2")},
    same={**SAME, "moe.experts": "num_local_experts", "moe.hidden": "intermediate_size"},
    built_in={**SOFTMAX, "moe.normalise": True},
    theirs={"hidden_act": "silu"},
    defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": 0},
    read=_mixtral_read,
    write=_mixtral_write,
)


def _qwen3_moe_read(theirs: Theirs) -> dict[str, Any]:
    layers, every, dense = (
        theirs.whole("num_hidden_layers"),
        theirs.whole("decoder_sparse_step"),
        theirs["mlp_only_layers"],
    )
    if not every:
        raise theirs.refuse("decoder_sparse_step", "must be at least 1")
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise theirs.refuse("mlp_only_layers", "must be a list of numbers of layers")
    if theirs["norm_topk_prob"] and theirs.whole("num_experts_per_tok") == 1:
        raise theirs.refuse("num_experts_per_tok", "cannot be expressed: the weight of a single expert is not made 1")
    sparse = [layer not in dense and (layer + 1) % every == 0 for layer in range(layers)]
    return {
        **read_attention(theirs),
        **stack([("attention", "moe" if moe else "mlp") for moe in sparse]),
        "attention.window": read_window(theirs),
        "mlp.hidden": theirs.whole("intermediate_size"),
    }


def _qwen3_moe_write(ours: Ours) -> dict[str, Any]:
    if ours["moe.top_k"] == 1 and ours["moe.normalise"]:
        remedy = "cannot be exported: Qwen3MoeForCausalLM makes the weight of a single expert 1; set normalise = False"
        raise ours.refuse("moe.top_k", remedy)
    window = ours["attention.window"]
    active = ours["moe.top_k"] * ours["moe.hidden"]
    dense = [layer for layer, block in enumerate(ours.spec.blocks) if block.channel == "mlp"]
    return {
        **write_attention(ours),
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "intermediate_size": ours["mlp.hidden"] if dense else active,
    }


QWEN3_MOE = llama_like(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    channels={"moe": pieces("mlp.gate.weight", "mlp.experts.{}", "gate_proj", "up_proj", "down_proj"), "mlp": MLP},
    block=ATTENTION + QK_NORM + PRE_NORMS,
    same={
        **SAME, "attention.bias": "attention_bias", "moe.experts": "num_experts", "moe.hidden": "moe_intermediate_size",
        "moe.normalise": "norm_topk_prob",
    },
    built_in={**SOFTMAX, "attention.qk_norm": True},
    theirs={"hidden_act": "silu"},
    defaults={
        "attention_bias": False, "rms_norm_eps": 1e-6, "norm_topk_prob": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": 4096,
    },
    aliases={"num_experts": "num_local_experts"},
    read=_qwen3_moe_read,
    write=_qwen3_moe_write,
)  # fmt: skip
