"""Mamba-1, Mamba-2 and the large xLSTM."""

from __future__ import annotations

import sys
from typing import Any

from scalelab.exchange.layout import Layout, Ours, Piece, Theirs, matrix, table, vector
from scalelab.models.mamba import EPS

PLAIN = {"embed_norm": False, "parscale.streams": 1, "positions": 0, "norm": "rmsnorm", "placement": "pre"}
MAMBA_OUTER = (
    table("backbone.embeddings.weight", "embed"),
    vector("backbone.norm_f.weight", "final_norm.scale"),
    matrix("lm_head.weight", "unembed"),
)
MAMBA_SAME = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "norm_eps": "layer_norm_epsilon", "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip
MAMBA_THEIRS = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}


def auto_rank(width: int) -> int:
    return -(-width // 16)


def _mamba_read(theirs: Theirs) -> dict[str, Any]:
    auto = auto_rank(theirs.whole("hidden_size"))
    rank = auto if theirs["time_step_rank"] == "auto" else theirs.whole("time_step_rank")
    return {"mamba.dt_rank": 0 if rank == auto else rank}


def _mamba_write(ours: Ours) -> dict[str, Any]:
    E = ours["mamba.expand"] * ours["width"]
    return {"time_step_rank": ours["mamba.dt_rank"] or auto_rank(ours["width"]), "intermediate_size": E}


MAMBA = Layout(
    model_type="mamba",
    architecture="MambaForCausalLM",
    base="backbone.",
    layer="backbone.layers.{}.",
    mixer="mamba",
    channels={"none": ()},
    outer=MAMBA_OUTER,
    block=(
        vector("norm.weight", "mixer_norms.norm.scale"),
        matrix("mixer.in_proj.weight", "mixer.inward"),
        Piece("mixer.conv1d.weight", ("mixer.conv",), "taps"),
        vector("mixer.conv1d.bias", "mixer.conv_bias"),
        matrix("mixer.x_proj.weight", "mixer.x"),
        matrix("mixer.dt_proj.weight", "mixer.dt"),
        vector("mixer.dt_proj.bias", "mixer.dt_bias"),
        table("mixer.A_log", "mixer.A_log"),
        vector("mixer.D", "mixer.D"),
        matrix("mixer.out_proj.weight", "mixer.out"),
    ),
    same={**MAMBA_SAME, "mamba.expand": "expand", "mamba.state": "state_size", "mamba.conv": "conv_kernel"},
    built_in={**PLAIN, "logit_cap": 0.0},
    theirs=MAMBA_THEIRS,
    defaults={
        "expand": 2, "state_size": 16, "conv_kernel": 4, "time_step_rank": "auto", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    read=_mamba_read,
    write=_mamba_write,
)  # fmt: skip


def _mamba2_read(theirs: Theirs) -> dict[str, Any]:
    inner = theirs.whole("expand") * theirs.whole("hidden_size")
    if theirs.whole("num_heads") * theirs.whole("head_dim") != inner:
        raise theirs.refuse("num_heads", f"must be expand * hidden_size / head_dim = {inner} / {theirs['head_dim']}")
    if theirs.number("layer_norm_epsilon") != EPS:  # one field for the blocks' norms and for the norm after the gate
        raise theirs.refuse("layer_norm_epsilon", f"cannot be expressed: the norm after the gate has {EPS}")
    infinite = float("inf"), {"__float__": "Infinity"}  # as json reads it, and as transformers 5 writes it
    if theirs.document.get("time_step_limit") not in (None, *([0.0, infinity] for infinity in infinite)):
        raise theirs.refuse("time_step_limit", "cannot be expressed: time steps are not clamped")
    return {}


def _mamba2_write(ours: Ours) -> dict[str, Any]:
    if ours["norm_eps"] != EPS:
        raise ours.refuse("norm_eps", f"cannot be exported: Mamba2ForCausalLM has one for all norms, {EPS}")
    return {"num_heads": ours["mamba2.expand"] * ours["width"] // ours["mamba2.head_dim"]}


MAMBA2 = Layout(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    base="backbone.",
    layer="backbone.layers.{}.",
    mixer="mamba2",
    channels={"none": ()},
    outer=MAMBA_OUTER,
    block=(
        vector("norm.weight", "mixer_norms.norm.scale"),
        matrix("mixer.in_proj.weight", "mixer.inward", "mixer.dt"),
        Piece("mixer.conv1d.weight", ("mixer.conv",), "taps"),
        vector("mixer.conv1d.bias", "mixer.conv_bias"),
        vector("mixer.dt_bias", "mixer.dt_bias"),
        vector("mixer.A_log", "mixer.A_log"),
        vector("mixer.D", "mixer.D"),
        vector("mixer.norm.weight", "mixer.norm"),
        matrix("mixer.out_proj.weight", "mixer.out"),
    ),
    same={
        **MAMBA_SAME, "mamba2.expand": "expand", "mamba2.head_dim": "head_dim", "mamba2.state": "state_size",
        "mamba2.groups": "n_groups", "mamba2.conv": "conv_kernel", "mamba2.chunk": "chunk_size",
    },
    built_in={**PLAIN, "logit_cap": 0.0},
    theirs=MAMBA_THEIRS,
    defaults={
        "expand": 2, "head_dim": 64, "state_size": 128, "n_groups": 8, "conv_kernel": 4, "chunk_size": 256,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    read=_mamba2_read,
    write=_mamba2_write,
)  # fmt: skip


def _up(width: int, factor: float, multiple: int) -> int:
    """The class's own rounding, which for a fractional width * factor can be one step below the ceiling."""
    return int((width * factor + multiple - 1) // multiple * multiple)


NO_CAP = 1e9  # its soft caps are always on; one this wide changes no float32


def _xlstm_read(theirs: Theirs) -> dict[str, Any]:
    width, multiple = theirs.whole("hidden_size"), theirs.whole("ffn_round_up_to_multiple_of")
    if not multiple:
        raise theirs.refuse("ffn_round_up_to_multiple_of", "must be at least 1")
    factor = theirs.number("ffn_proj_factor")
    if not 0 < factor * width < sys.maxsize:
        raise theirs.refuse("ffn_proj_factor", f"times hidden_size = {width} is no width")
    hidden = _up(width, factor, multiple)
    caps = {"logit_cap": theirs.number("output_logit_soft_cap"), "mlstm.gate_cap": theirs.number("gate_soft_cap")}
    return {"mlp.hidden": hidden, **{name: 0.0 if cap >= NO_CAP else float(cap) for name, cap in caps.items()}}


def _xlstm_write(ours: Ours) -> dict[str, Any]:
    width, hidden = ours["width"], ours["mlp.hidden"]
    multiple = 64 if hidden % 64 == 0 else 1
    factor = hidden / width if _up(width, hidden / width, multiple) == hidden else (hidden + 0.5) / width
    assert _up(width, factor, multiple) == hidden, (width, hidden)
    return {
        "embedding_dim": width,
        "num_blocks": ours["layers"],
        "output_logit_soft_cap": ours["logit_cap"] or NO_CAP,
        "gate_soft_cap": ours["mlstm.gate_cap"] or NO_CAP,
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "autocast_kernel_dtype": "float32",  # or else its cell runs in bfloat16
        # Its decoding state has widths rounded up to multiples of 64, which fits no others.
        "use_cache": width % 64 == 0 and int(ours["mlstm.qk_factor"] * width) % 64 == 0,
    }


XLSTM = Layout(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    base="backbone.",
    layer="backbone.blocks.{}.",
    mixer="mlstm",
    channels={
        "mlp": (
            vector("norm_ffn.weight", "channel_norms.norm.scale"),
            matrix("ffn.proj_up_gate.weight", "channel.gate"),
            matrix("ffn.proj_up.weight", "channel.up"),
            matrix("ffn.proj_down.weight", "channel.down"),
        )
    },
    outer=(
        table("backbone.embeddings.weight", "embed"),
        vector("backbone.out_norm.weight", "final_norm.scale"),
        matrix("lm_head.weight", "unembed"),
    ),
    block=(
        vector("norm_mlstm.weight", "mixer_norms.norm.scale"),
        *(matrix(f"mlstm_layer.{name}.weight", f"mixer.{name}") for name in "qkv"),
        *(matrix(f"mlstm_layer.{name}gate_preact.weight", f"mixer.{name}") for name in "oif"),
        *(vector(f"mlstm_layer.{name}gate_preact.bias", f"mixer.{name}_bias") for name in "if"),
        vector("mlstm_layer.multihead_norm.weight", "mixer.norm"),
        matrix("mlstm_layer.out_proj.weight", "mixer.out"),
    ),
    same={
        "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "norm_eps": "norm_eps",
        "tied_embeddings": "tie_word_embeddings", "mlstm.heads": "num_heads", "mlstm.qk_factor": "qk_dim_factor",
        "mlstm.chunk": "chunk_size",
    },
    built_in={**PLAIN, "mlp.kind": "swiglu", "mlp.bias": False},
    theirs={"use_bias": False, "add_out_norm": True, "v_dim_factor": 1.0, "weight_mode": "single", "eps": 1e-6},
    defaults={
        "norm_eps": 1e-6, "tie_word_embeddings": False, "output_logit_soft_cap": 30.0, "num_heads": 8,
        "qk_dim_factor": 0.5, "gate_soft_cap": 15.0, "chunk_size": 64, "ffn_proj_factor": 2.667,
        "ffn_round_up_to_multiple_of": 64,
    },
    read=_xlstm_read,
    write=_xlstm_write,
    aliases={"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"},
    can_tie=False,
)  # fmt: skip
