"""Models of every kind that is exchanged, and their files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from scalelab import models
from tests.models.family import section

GPT2 = {
    "positions": 12, "norm": "layernorm", "norm_eps": 1e-5, "attention__bias": True, "attention__rope_theta": 0.0,
    "attention__kv_heads": 4, "mlp__kind": "gelu", "mlp__bias": True,
}  # fmt: skip
LOCAL, GLOBAL = ("attention", "mlp", {"window": 4}), ("attention", "mlp")
MOE = {"blocks": (("attention", "moe"),), "moe__experts": 5, "moe__top_k": 2, "moe__hidden": 12}
XLSTM = {"blocks": (("mlstm", "mlp"),), "mlstm__heads": 2, "mlstm__chunk": 4}
MAMBA2 = {
    "blocks": (("mamba2", "none"),), "norm_eps": 1e-5, "mamba2__head_dim": 4, "mamba2__state": 5, "mamba2__groups": 2,
    "mamba2__chunk": 4,
}  # fmt: skip
MODELS = {
    "gpt2": section(**GPT2),
    "gpt2 untied": section(**GPT2, tied_embeddings=False),
    "llama": section(tied_embeddings=False, attention__rope_theta=500.0, attention__head_dim=6),
    "llama biases": section(attention__bias=True, mlp__bias=True, mlp__kind="geglu"),
    "mistral": section(attention__window=3),
    "qwen2": section(attention__qkv_bias=True, blocks=(LOCAL, GLOBAL), layers=4),
    "qwen3": section(attention__qk_norm=True, prefix=(GLOBAL,), blocks=(LOCAL,), layers=3, attention__head_dim=6),
    "olmo2": section(placement="out", attention__qk_norm=True, attention__qk_norm_full=True, tied_embeddings=False),
    "mamba": section(blocks=(("mamba", "none"),), mamba__state=3, mamba__chunk=4, mamba__dt_rank=2, norm_eps=1e-5),
    "mamba untied": section(blocks=(("mamba", "none"),), mamba__expand=3, norm_eps=1e-5, tied_embeddings=False),
    "mamba2": section(**MAMBA2),
    "mamba2 untied": section(**MAMBA2, tied_embeddings=False),
    "mixtral": section(**MOE, tied_embeddings=False, attention__window=3),
    "qwen3_moe": section(**MOE, attention__qk_norm=True, moe__normalise=False, attention__head_dim=6),
    "qwen3_moe dense first": section(**MOE, attention__qk_norm=True, prefix=(GLOBAL,), layers=3),
    "xlstm": section(**XLSTM, logit_cap=30.0, tied_embeddings=False),
    "xlstm without caps": section(**XLSTM, mlstm__gate_cap=0.0, tied_embeddings=False, mlp__hidden=128),
}


def drawn(config, seed=0):
    """Parameters, no two of them equal."""
    rng = np.random.default_rng(seed)
    _, shapes = models.abstract(config)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), jnp.float32), shapes)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def edit(folder, **changes):
    """Changes fields of config.json; None takes one away."""
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def rewrite(folder, **changes):
    """Changes tensors, dots in their names written as __; None takes one away."""
    found = tensors(folder) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: a for name, a in found.items() if a is not None}, folder / "model.safetensors")


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
