"""Mixture of experts: a Transformer with fine-grained experts in place of its MLPs, dropless.

    scalelab train --config=moe:size=s,steps=200
    scalelab train --config=configs/moe.py:params=1e6,data=my_corpus --config.model.moe.lbl_scope=sequence

Arguments: size (xs | s | m | l: the recipe at widths 64 to 512 | mixtral-8x7b | qwen3-30b-a3b | olmoe | ling-mini: the
published shapes), or params (target of *active* ones without embeddings), steps, data, tokenizer, dtype as in
`transformer`. OLMoE normalises queries and keys over the whole width and Ling 2.0 rotates half of each head; here both
are per head and whole. Learning rates of published shapes are those of their reports where these give one.
"""

from typing import Any

from scalelab import recipe
from scalelab.schema import Config


def _published(width: int, layers: int, heads: int, kv_heads: int, **moe: Any) -> dict[str, Any]:
    return {
        "model.width": width, "model.layers": layers, "model.blocks": (("attention", "moe"),),
        "model.attention.heads": heads, "model.attention.kv_heads": kv_heads, "model.attention.head_dim": 128,
        "model.tied_embeddings": False, "data.seq_len": 4096, "optim.lr": 4e-4,
        **{f"model.moe.{name}": value for name, value in moe.items()},
    }  # fmt: skip


PUBLISHED = {
    "mixtral-8x7b": {
        **_published(4096, 32, 32, 8, experts=8, top_k=2, hidden=14336),
        "model.norm_eps": 1e-5, "model.attention.rope_theta": 1e6,
    },
    "qwen3-30b-a3b": {
        **_published(2048, 48, 32, 4, experts=128, top_k=8, hidden=768, lbl=0.001),
        "model.attention.rope_theta": 1e6, "model.attention.qk_norm": True,
    },
    "olmoe": {
        **_published(2048, 16, 16, 16, experts=64, top_k=8, hidden=1024, normalise=False, lbl_scope="micro_batch"),
        "model.norm_eps": 1e-5, "model.attention.qk_norm": True,
    },
    "ling-mini": {
        **_published(2048, 20, 16, 4, experts=256, top_k=8, hidden=512, shared=1, router="sigmoid", scale=2.5, groups=8,
                     top_groups=4, lbl=0.0, z_loss=3.5e-6, bias_rate=1e-3, bias_centred=True),
        "model.prefix": (("attention", "mlp"),), "model.mlp.hidden": 5120,
        "model.attention.rope_theta": 6e5, "model.attention.qk_norm": True,
    },
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    return recipe.config("moe", arg, PUBLISHED)
