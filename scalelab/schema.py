"""The schema of a config: every field with its default, and what its values must be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from pallas_kernels.dispatch import KERNELS
from scalelab.errors import BadInput

# An ml_collections.ConfigDict with the fields of `base()`; to a type checker its fields are all unknown.
Config: TypeAlias = Any


SOURCE_KINDS = ("text", "tokens", "synthetic", "probe")

# Sections of mixers that came after the first schema.
LATER_SECTIONS: dict[str, dict[str, Any]] = {
    "parscale": {
        "streams": 1,  # P; 1: the plain model
        "prefix": 48,  # learned keys and values of each stream in every attention layer
        "smoothing": 0.01,  # eps: each stream weighs at least eps / P; the paper's runs had 0.1
    },
    "recursion": {
        "count": 1,  # Nr, how often the layers of `blocks` are applied; 1: the plain model
        "capacities": (),  # share of a sequence's tokens that each takes in training; (): linear, 1, (Nr - 1) / Nr, ..
        "alpha": 0.1,  # of the gate, at most what of the layers' output is added
        "temperature": 1.0,  # of the router's logits
        "loss": 0.001,  # coefficient of the loss that teaches the router's logits their sign
    },
    "moe": {
        "experts": 8,  # Ne
        "top_k": 2,  # k
        "hidden": 256,  # Fe of one expert
        "shared": 0,  # experts of every token
        "router": "softmax",  # softmax | sigmoid
        "normalise": True,  # weights of the k sum to 1 (never for k = 1)
        "scale": 1.0,  # of the weights
        "groups": 1,  # of experts, of which the best `top_groups` compete for a token
        "top_groups": 1,
        "capacity": 0.0,  # of an expert in a training sequence, over T k / Ne; 0: dropless
        "lbl": 0.01,  # coefficient of the balance loss
        "lbl_scope": "global",  # sequence | micro_batch | global
        "lbl_sequences": 1,  # in a micro-batch
        "z_loss": 0.001,  # of the router
        "bias_rate": 0.0,  # step of the selection bias; 0: none
        "bias_centred": False,  # its steps have mean 0
    },
    "mlstm": {
        "heads": 4,
        "qk_factor": 0.5,  # width of all queries over the model's
        "gate_cap": 15.0,  # of the gates' pre-activations; 0: none
        "chunk": 64,  # Q
    },
    "mlstm_up": {
        "heads": 4,
        "expand": 2,  # inner width E over the width
        "conv": 4,  # K
        "chunk": 64,  # Q
    },
    "slstm": {"heads": 4, "conv": 4},
    "mamba": {
        "expand": 2,  # inner width E over the width
        "state": 16,  # N
        "conv": 4,  # K
        "dt_rank": 0,  # R; 0: width / 16, rounded up
        "chunk": 64,  # tokens between the states that the backward pass keeps
    },
    "mamba2": {
        "expand": 2,  # inner width E over the width
        "head_dim": 64,  # P; E / P heads
        "state": 128,  # N
        "groups": 1,  # G: heads that share B and C, E / P / G each
        "conv": 4,  # K
        "chunk": 64,  # Q
    },
    "gla": {
        "heads": 4,
        "conv": 0,  # K; 0: none
        "chunk": 32,  # Q, a power of two
    },
    "deltanet": {
        "heads": 4,
        "conv": 4,  # K
        "negative": False,  # beta up to 2: eigenvalues from -1 on
        "chunk": 32,  # Q
    },
    "gated_deltanet": {
        "heads": 4,  # of queries and keys
        "value_heads": 4,  # a multiple of heads
        "key_dim": 48,  # of one head
        "value_dim": 96,  # of one head
        "conv": 4,  # K
        "negative": False,  # beta up to 2: eigenvalues from -1 on
        "chunk": 32,  # Q
    },
    "lightning": {"heads": 4, "head_dim": 64, "chunk": 64},
}


def base() -> Config:
    """Every field that a run has, with its default. Types are those of the defaults; all fields are required."""
    config = ConfigDict()
    config.family = "transformer"  # what the record calls the architecture
    config.seed = 0  # initialisation
    config.data_seed = 0  # order of the training data; runs that share it are paired

    config.model = ConfigDict(
        {
            "vocab_size": 0,  # 0: that of the tokenizer
            "width": 256,
            "layers": 4,  # prefix + whole repeats of `blocks` + suffix; those that recursions share count once
            # Each entry: (sequence mixer, channel mixer or "none"[, {option: value} over the mixer's section]).
            "prefix": (),
            "blocks": (("attention", "mlp"),),
            "suffix": (),
            "norm": "rmsnorm",  # rmsnorm | layernorm | layernorm_gain (no bias)
            "norm_eps": 1e-6,
            "placement": "pre",  # pre | post | peri | out
            "embed_norm": False,
            "positions": 0,  # learned absolute positions, one vector each; 0: none
            "tied_embeddings": True,
            "logit_cap": 0.0,  # 0: none
            "init": "normal",  # normal | small | fan_in
            "init_std": 0.02,  # for `normal`
            "parametrization": "standard",  # standard | mup | completep
            "mup": {  # of both
                "base_width": 0,  # D_base, where learning rate, decay and initialisation are those of `standard`
                "base_layers": 0,  # L_base
                # Other fields in which the base model differs, (("mlstm.heads", 4), ...). By default it has this
                # model's head widths, and heads and inner widths in proportion to the width.
                "base": (),
                "embed_multiplier": 1.0,  # a_in
                "logit_multiplier": 1.0,  # a_out
            },
            "compute_dtype": "bfloat16",  # parameters are float32 always
            "remat": "none",  # none | dots | full
            "loss_chunk": 2048,  # tokens whose logits exist at one time
            "attention": {
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 64,
                "rope_theta": 10000.0,  # 0: no rotation
                "qk_norm": False,
                "qk_norm_full": False,  # QK-norm over all heads at once (OLMo 2) in place of each by itself
                "window": 0,  # 0: none; counts the token itself
                "soft_cap": 0.0,  # 0: none
                "bias": False,
                "qkv_bias": False,  # on q, k, v and not on the output (Qwen 2)
            },
            "mlp": {"kind": "swiglu", "hidden": 704, "bias": False},  # swiglu | geglu | gelu
            **{section: dict(fields) for section, fields in LATER_SECTIONS.items()},
        }
    )
    config.start = ConfigDict(
        {
            "path": "",  # a run's folder or an imported model, whose parameters are taken; "": none
            "train": "all",  # all | new: the tensors that the start does not have
        }
    )
    config.data = ConfigDict(
        {
            # name -> kind (text | tokens | synthetic | probe), path ("": the embedded corpus), weight in the mixture
            "sources": {"stdlib": {"kind": "text", "path": "", "weight": 1.0}},
            "tokenizer": "bytes",  # for `text`; token shards bring their own
            "seq_len": 256,
            "batch_size": 16,  # sequences in a global batch
            "document_mask": True,  # attention stays inside documents
            "held_out_tokens": 131072,  # at most, per source; whole documents
            "threads": 1,  # that read ahead
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "lr": 3e-3,
            "schedule": "cosine",  # cosine | wsd | constant
            "warmup": 0.05,  # share of the steps
            "cooldown": 0.2,  # share of the steps, for wsd
            "final_lr": 0.1,  # share of the peak
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,  # times the learning rate, as in optax and torch
            "decay_embeddings": False,
            "decay_exponent": 1.0,  # p of weight_decay x m^p on matrices of m times the base fan-in (mup, completep)
            "clip": 1.0,  # global gradient norm; 0: none
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1000,
            "accum_steps": 1,  # parts that a global batch is cut into, one after the other
            "z_loss": 0.0,
            "eval_every": 0.1,  # share of the steps between held-out evaluations; the last step always has one
            "diverge_above": 2.0,  # times ln(vocabulary): after warm-up, a loss above it ends the run
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every_s": 120.0,  # seconds between checkpoints; 0: only where asked by `keep_at`
            "every": 0,  # steps between checkpoints, on top of the clock; 0: off
            "keep_last": 2,
            "keep_at": (),  # steps whose checkpoints stay
            "final": "weights",  # of a finished run stay: weights | all | nothing
        }
    )
    config.log = ConfigDict({"wandb": "", "tensorboard": False})  # wandb: online | offline
    config.mesh = ConfigDict({"data": 0})  # devices along the batch; 0: all
    config.kernels = "auto"  # auto | xla | reference | an implementation by name, see pallas_kernels/dispatch.py
    config.unroll = 0  # repeats of the blocks written out in the program, the rest a loop; 0: all on a GPU, 1 elsewhere
    config.runs = "runs"  # folder of run directories
    return config


# What a run is, is independent of where, how visibly and how safely it runs: these never enter its id. Nor do the
# tokenizer's name, which may be a path, and where the parameters lie that it starts from: the content hashes know both.
OUTSIDE_ID = ("checkpoint", "log", "mesh", "kernels", "unroll", "runs", "data.threads", "data.tokenizer", "start.path")
# Fields added after schema 1, with the default under which the older runs ran: left out of the id where equal.
ADDED_LATER: dict[str, Any] = {
    f"model.{section}.{name}": value for section, fields in LATER_SECTIONS.items() for name, value in fields.items()
}
ADDED_LATER |= {
    "start.train": "all",
    "model.positions": 0,
    "model.attention.qk_norm_full": False,
    "model.attention.qkv_bias": False,
    "model.parametrization": "standard",
    "model.mup.base_width": 0,
    "model.mup.base_layers": 0,
    "model.mup.base": (),
    "model.mup.embed_multiplier": 1.0,
    "model.mup.logit_multiplier": 1.0,
    "optim.decay_exponent": 1.0,
}
# Defaults that changed, (former, new), where the value is one of speed and, beyond that, of rounding alone, as the mesh
# is: a run has the same id under either, lest an upgrade train finished studies again.
CHANGED_LATER: dict[str, tuple[Any, Any]] = {"model.loss_chunk": (1024, 2048)}

# ------------------------------------------------------------------------------------------------ validation


def _named(field: str) -> str:
    """As the user wrote it: an option, an argument, or a field of the config."""
    return field if field.startswith(("--", "argument ")) else f"config.{field}"


def choice(field: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise BadInput(_named(field), value, f"must be one of {', '.join(allowed)}")


def at_least(field: str, value: float, least: float, *, above: bool = False) -> None:
    finite = math.isfinite(value)
    if not finite or value < least or (above and value == least):
        remedy = f"must be {'' if finite else 'finite and '}{'above' if above else 'at least'} {least}"
        raise BadInput(_named(field), value, remedy)


def between(field: str, value: float, low: float, high: float, *, below: bool = False) -> None:
    if not low <= value <= high or (below and value == high):
        raise BadInput(_named(field), value, f"must lie in [{low}, {high}{')' if below else ']'}")


def validate(config: Config) -> None:
    """Checks that need no model and no data. `models.validate` and `data.open` hold their own."""
    _check_schema(config)
    data, optim, train = config.data, config.optim, config.train
    for field in ("seq_len", "batch_size", "held_out_tokens", "threads"):
        at_least(f"data.{field}", data[field], 1)
    if not data.sources:
        raise BadInput("config.data.sources", {}, "needs at least one source")
    for name, source in data.sources.items():
        choice(f"data.sources.{name}.kind", source.kind, SOURCE_KINDS)
        at_least(f"data.sources.{name}.weight", source.weight, 0, above=True)
    choice("start.train", config.start.train, ("all", "new"))
    if config.start.train == "new" and not config.start.path:
        raise BadInput("config.start.train", "new", "needs config.start.path, the parameters to start from")
    choice("optim.name", optim.name, ("adamw",))
    choice("optim.schedule", optim.schedule, ("cosine", "wsd", "constant"))
    at_least("optim.lr", optim.lr, 0, above=True)
    at_least("optim.eps", optim.eps, 0, above=True)
    for field in ("weight_decay", "clip", "decay_exponent"):
        at_least(f"optim.{field}", optim[field], 0)
    for field in ("warmup", "cooldown", "final_lr"):
        between(f"optim.{field}", optim[field], 0, 1)
    for field in ("beta1", "beta2"):
        between(f"optim.{field}", optim[field], 0, 1, below=True)
    if optim.schedule == "wsd" and optim.warmup + optim.cooldown > 1:
        raise BadInput("config.optim.cooldown", optim.cooldown, f"warmup {optim.warmup} + cooldown must not exceed 1")
    at_least("train.steps", train.steps, 1)
    at_least("train.accum_steps", train.accum_steps, 1)
    at_least("train.z_loss", train.z_loss, 0)
    between("train.eval_every", train.eval_every, 0, 1)
    at_least("train.diverge_above", train.diverge_above, 0, above=True)
    if data.batch_size % train.accum_steps:
        raise BadInput(
            "config.train.accum_steps", train.accum_steps, f"must divide data.batch_size = {data.batch_size}"
        )
    micro, together = data.batch_size // train.accum_steps, config.model.moe.lbl_sequences
    at_least("model.moe.lbl_sequences", together, 1)
    if config.model.moe.lbl_scope == "micro_batch" and micro % together:
        remedy = f"must divide the {micro} sequences of a pass (data.batch_size / train.accum_steps)"
        raise BadInput("config.model.moe.lbl_sequences", together, remedy)
    for field in ("every_s", "every"):
        at_least(f"checkpoint.{field}", config.checkpoint[field], 0)
    at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    choice("checkpoint.final", config.checkpoint.final, ("weights", "all", "nothing"))
    for step in config.checkpoint.keep_at:
        if not isinstance(step, int) or not 0 < step <= train.steps:
            raise BadInput("config.checkpoint.keep_at", step, f"must be steps from 1 to {train.steps}")
    choice("log.wandb", config.log.wandb, ("", "online", "offline"))
    at_least("mesh.data", config.mesh.data, 0)
    choice("kernels", config.kernels, KERNELS)
    at_least("unroll", config.unroll, 0)
    if 0 < config.model.positions < data.seq_len:
        remedy = f"is too few for data.seq_len = {data.seq_len}; 0 takes no learned positions"
        raise BadInput("config.model.positions", config.model.positions, remedy)
    for field in ("seed", "data_seed"):
        between(field, config[field], 0, 2**32 - 1)


def _check_schema(config: Config) -> None:
    """The config of a user's file has the fields of `base()`, no other, and of their types."""

    def walk(node: Mapping[str, Any], model: Mapping[str, Any], path: str) -> None:
        for name, value in node.items():
            field = f"{path}{name}"
            if path == "data.sources.":
                walk(value, {"kind": "", "path": "", "weight": 1.0}, f"{field}.")
                continue
            if name not in model:
                raise BadInput(f"config.{field}", value, suggest(name, model))
            if isinstance(model[name], Mapping):
                if not isinstance(value, Mapping):
                    raise BadInput(f"config.{field}", value, "is a section")
                walk(value, model[name], f"{field}.")
            elif type(value) is not type(model[name]):
                raise BadInput(f"config.{field}", value, f"must be of type {type(model[name]).__name__}")
        for name in model:
            if name not in node and path != "data.sources.":
                raise BadInput(f"config.{path}{name}", None, f"is missing; the default is {model[name]!r}")

    walk(config.to_dict(), base().to_dict(), "")


def suggest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"no such field; did you mean {near[0]}? " if near else "no such field; ") + "known: " + ", ".join(known)
