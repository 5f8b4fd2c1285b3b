"""Attention and MLP: GPT-2, Llama, Mistral, Qwen 2, Qwen 3, OLMo 2."""

from __future__ import annotations

import sys
from typing import Any

from scalelab.errors import BadInput
from scalelab.exchange.layout import Layout, Ours, Piece, Theirs, matrix, stack, table, vector

# ------------------------------------------------------------------------------------------------ fields in common

PLAIN = {"embed_norm": False, "parscale.streams": 1, "attention.soft_cap": 0.0}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}  # their activation -> our kind of MLP
SAME = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "attention.heads": "num_attention_heads",
    "mlp.hidden": "intermediate_size",
}
SAME_BUT_MLP = {ours: theirs for ours, theirs in SAME.items() if ours != "mlp.hidden"}


def rope_theta(theirs: Theirs) -> float:
    """From `rope_parameters` or from `rope_theta` beside `rope_scaling`; what scales the angles is refused."""
    theta = theirs.document.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = theirs.document.get(name) or {}
        if not isinstance(rope, dict):
            raise theirs.refuse(name, "must be an object, such as {'rope_type': 'default'}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            raise theirs.refuse(name, "is a scaled rotary embedding, which cannot be expressed; only rope_type default")
        if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
            raise theirs.refuse(name, "turns a part of each head only, which cannot be expressed")
        theta = rope.get("rope_theta", theta)
    if (theirs.document.get("partial_rotary_factor") or 1.0) != 1.0:
        raise theirs.refuse("partial_rotary_factor", "turns a part of each head only, which cannot be expressed")
    theta = theirs["rope_theta"] if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta <= sys.float_info.max:
        raise BadInput("config.json: rope_theta", theta, "must be a positive number")
    return float(theta)


def read_attention(theirs: Theirs) -> dict[str, Any]:
    """Heads and rotation."""
    heads, width = theirs.whole("num_attention_heads"), theirs.whole("hidden_size")
    own = "head_dim" in theirs.defaults or theirs.document.get("head_dim") is not None
    if not heads or (width % heads and not own):
        raise theirs.refuse("num_attention_heads", f"must divide hidden_size = {width}")
    return {
        "attention.kv_heads": theirs.whole_or("num_key_value_heads", heads),
        "attention.head_dim": theirs.whole_or("head_dim", theirs.defaults.get("head_dim") or width // heads),
        "attention.rope_theta": rope_theta(theirs),
    }


def read(theirs: Theirs) -> dict[str, Any]:
    """Heads, rotation and activation."""
    if theirs["hidden_act"] not in list(GATED):
        raise theirs.refuse("hidden_act", f"cannot be expressed; known: {', '.join(GATED)}")
    return {**read_attention(theirs), "mlp.kind": GATED[theirs["hidden_act"]]}


def write_attention(ours: Ours) -> dict[str, Any]:
    """The inverse of `read_attention`, for transformers of before and after version 5."""
    theta = ours["attention.rope_theta"]
    if not theta:
        raise ours.refuse("attention.rope_theta", "cannot be exported: attention without rotation has no class")
    return {
        "num_key_value_heads": ours["attention.kv_heads"],
        "head_dim": ours["attention.head_dim"],
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def write(ours: Ours) -> dict[str, Any]:
    """The inverse of `read`."""
    acts = {kind: act for act, kind in reversed(GATED.items())}
    if ours["mlp.kind"] not in acts:
        raise ours.refuse("mlp.kind", "cannot be exported with rotary attention: must be swiglu or geglu")
    return {**write_attention(ours), "hidden_act": acts[ours["mlp.kind"]]}


# ------------------------------------------------------------------------------------------------ windows


def read_window(theirs: Theirs) -> int:
    """`sliding_window`, 0 for none: that is what null says, and `use_sliding_window: false` where a class has it."""
    if "use_sliding_window" in theirs.defaults and not theirs.flag("use_sliding_window"):
        return 0
    return 0 if theirs.document.get("sliding_window", 0) is None else theirs.whole("sliding_window")


def read_windows(theirs: Theirs) -> dict[str, Any]:
    """A window of `sliding_window` tokens in the layers that `layer_types` names, or from `max_window_layers` on."""
    layers = theirs.whole("num_hidden_layers")
    kinds = theirs.document.get("layer_types")
    window = read_window(theirs)
    if kinds is None:
        kinds = [_kind(window and i >= theirs.whole("max_window_layers")) for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise theirs.refuse("layer_types", f"must be {layers} times {FULL} or {SLIDING}")
    if SLIDING in kinds and not window:
        raise theirs.refuse("sliding_window", f"must be a number of tokens where layer_types has {SLIDING}")
    if set(kinds) == {SLIDING}:
        return {"attention.window": window}
    return stack(
        [("attention", "mlp", {"window": window}) if kind == SLIDING else ("attention", "mlp") for kind in kinds]
    )


def write_windows(ours: Ours) -> dict[str, Any]:
    windows = [block.mixer_options.window for block in ours.spec.blocks]
    sizes = {window for window in windows if window}
    if len(sizes) > 1:
        raise ours.refuse("attention.window", "cannot be exported: windows must be of one size", sorted(sizes))
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": max(windows) or None,
        "max_window_layers": next((i for i, window in enumerate(windows) if window), len(windows)),
        "layer_types": [_kind(window) for window in windows],
    }


FULL, SLIDING = "full_attention", "sliding_attention"


def _kind(window: Any) -> str:
    return SLIDING if window else FULL


WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

# ------------------------------------------------------------------------------------------------ tensors


OUTER = (
    table("model.embed_tokens.weight", "embed"),
    vector("model.norm.weight", "final_norm.scale"),
    matrix("lm_head.weight", "unembed"),
)
ATTENTION = tuple(
    piece
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj"))
    for piece in (
        matrix(f"self_attn.{theirs}.weight", f"mixer.{ours}"),
        vector(f"self_attn.{theirs}.bias", f"mixer.{ours}_bias"),
    )
)
QK_NORM = tuple(vector(f"self_attn.{name}_norm.weight", f"mixer.{name}_norm") for name in "qk")
MLP = tuple(
    piece
    for name in ("gate", "up", "down")
    for piece in (
        matrix(f"mlp.{name}_proj.weight", f"channel.{name}"),
        vector(f"mlp.{name}_proj.bias", f"channel.{name}_bias"),
    )
)
PRE_NORMS = (
    vector("input_layernorm.weight", "mixer_norms.norm.scale"),
    vector("post_attention_layernorm.weight", "channel_norms.norm.scale"),
)
OUT_NORMS = (
    vector("post_attention_layernorm.weight", "mixer_norms.norm_out.scale"),
    vector("post_feedforward_layernorm.weight", "channel_norms.norm_out.scale"),
)

# ------------------------------------------------------------------------------------------------ classes


def llama_like(model_type: str, architecture: str, **changes: Any) -> Layout:
    """Pre-norm RMSNorm, rotary grouped-query attention without biases, gated MLP; and what the class has beside it."""
    built_in = {"attention.bias": False, "attention.qkv_bias": False, "attention.qk_norm": False, "mlp.bias": False}
    built_in |= {
        "norm": "rmsnorm",
        "placement": "pre",
        "positions": 0,
        "logit_cap": 0.0,
        "attention.qk_norm_full": False,
    }
    common = {"block": ATTENTION + PRE_NORMS, "channels": {"mlp": MLP}, "theirs": {}, "read": read, "write": write}
    same = {**(SAME if "channels" not in changes else SAME_BUT_MLP), **changes.pop("same", {})}
    built_in = {**PLAIN, **built_in, **changes.pop("built_in", {})}
    defaults = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **changes.pop("defaults", {}),
    }
    return Layout(
        model_type=model_type, architecture=architecture, base="model.", layer="model.layers.{}.",
        mixer="attention", outer=OUTER, same=same, defaults=defaults,
        built_in={name: value for name, value in built_in.items() if name not in same},
        ignored=r".*rotary_emb\.inv_freq",
        **{**common, **changes},
    )  # fmt: skip


def _llama_write(ours: Ours) -> dict[str, Any]:
    if ours["width"] % ours["attention.heads"]:
        remedy = f"cannot be exported: LlamaForCausalLM wants a divisor of the width {ours['width']}"
        raise ours.refuse("attention.heads", remedy)
    return write(ours)


LLAMA = llama_like(
    "llama",
    "LlamaForCausalLM",
    same={"attention.bias": "attention_bias", "mlp.bias": "mlp_bias"},
    built_in={"attention.window": 0},
    defaults={"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
    write=_llama_write,
)

MISTRAL = llama_like(
    "mistral",
    "MistralForCausalLM",
    read=lambda theirs: {**read(theirs), "attention.window": read_window(theirs)},
    write=lambda ours: {**write(ours), "sliding_window": ours["attention.window"] or None},
    defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096},
)

QWEN2 = llama_like(
    "qwen2",
    "Qwen2ForCausalLM",
    built_in={"attention.qkv_bias": True},
    defaults={**WINDOWS, "rms_norm_eps": 1e-6},
    read=lambda theirs: {**read(theirs), **read_windows(theirs)},
    write=lambda ours: {**write(ours), **write_windows(ours)},
)

QWEN3 = llama_like(
    "qwen3",
    "Qwen3ForCausalLM",
    block=ATTENTION + QK_NORM + PRE_NORMS,
    same={"attention.bias": "attention_bias"},
    built_in={"attention.qk_norm": True},
    defaults={**WINDOWS, "attention_bias": False, "head_dim": 128, "rms_norm_eps": 1e-6},
    read=lambda theirs: {**read(theirs), **read_windows(theirs)},
    write=lambda ours: {**write(ours), **write_windows(ours)},
)

OLMO2 = llama_like(
    "olmo2",
    "Olmo2ForCausalLM",
    block=ATTENTION + QK_NORM + OUT_NORMS,
    same={"attention.bias": "attention_bias"},
    built_in={
        "placement": "out", "attention.qk_norm": True, "attention.qk_norm_full": True, "attention.window": 0,
    },
    defaults={"attention_bias": False, "rms_norm_eps": 1e-5},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ GPT-2


def _gpt2_read(theirs: Theirs) -> dict[str, Any]:
    heads, width = theirs.whole("n_head"), theirs.whole("n_embd")
    if theirs["activation_function"] not in ("gelu_new", "gelu_pytorch_tanh"):
        raise theirs.refuse("activation_function", "cannot be expressed: must be gelu_new (the tanh approximation)")
    if not heads or width % heads:
        raise theirs.refuse("n_head", f"must divide n_embd = {width}")
    return {
        "attention.kv_heads": heads,
        "attention.head_dim": width // heads,
        "mlp.hidden": theirs.whole_or("n_inner", 4 * width),
    }


def _gpt2_write(ours: Ours) -> dict[str, Any]:
    heads, width = ours["attention.heads"], ours["width"]
    if ours["attention.kv_heads"] != heads:
        raise ours.refuse("attention.kv_heads", f"cannot be exported: GPT2LMHeadModel has as many as heads = {heads}")
    if ours["attention.head_dim"] * heads != width:
        raise ours.refuse("attention.head_dim", f"cannot be exported: must be width / heads = {width} / {heads}")
    if not ours["positions"]:
        raise ours.refuse("positions", "cannot be exported: GPT2LMHeadModel has learned positions")
    return {"activation_function": "gelu_new", "n_inner": ours["mlp.hidden"]}


def _gpt2_columns(theirs: str, *ours: str) -> tuple[Piece, Piece]:
    biases = tuple(f"{name}_bias" for name in ours)
    return Piece(f"{theirs}.weight", ours, "columns"), Piece(f"{theirs}.bias", biases, "vector")


def _gpt2_norm(theirs: str, ours: str) -> tuple[Piece, Piece]:
    return vector(f"{theirs}.weight", f"{ours}.scale"), vector(f"{theirs}.bias", f"{ours}.bias")


GPT2 = Layout(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base="transformer.",
    layer="transformer.h.{}.",
    mixer="attention",
    channels={"mlp": (*_gpt2_columns("mlp.c_fc", "channel.up"), *_gpt2_columns("mlp.c_proj", "channel.down"))},
    outer=(
        table("transformer.wte.weight", "embed"),
        table("transformer.wpe.weight", "positions"),
        *_gpt2_norm("transformer.ln_f", "final_norm"),
        matrix("lm_head.weight", "unembed"),
    ),
    block=(
        *_gpt2_norm("ln_1", "mixer_norms.norm"),
        *_gpt2_columns("attn.c_attn", "mixer.q", "mixer.k", "mixer.v"),
        *_gpt2_columns("attn.c_proj", "mixer.out"),
        *_gpt2_norm("ln_2", "channel_norms.norm"),
    ),
    same={
        "vocab_size": "vocab_size", "width": "n_embd", "layers": "n_layer", "positions": "n_positions",
        "norm_eps": "layer_norm_epsilon", "tied_embeddings": "tie_word_embeddings", "attention.heads": "n_head",
    },
    built_in={
        **PLAIN, "norm": "layernorm", "placement": "pre", "logit_cap": 0.0, "attention.rope_theta": 0.0,
        "attention.bias": True, "attention.qk_norm": False, "attention.window": 0, "mlp.kind": "gelu", "mlp.bias": True,
    },
    theirs={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    read=_gpt2_read,
    write=_gpt2_write,
    ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)  # fmt: skip
