"""Mamba-2 (Dao & Gu 2024): a stack of selective recurrences, no attention and no MLP.

    scalelab train --config=mamba:size=s,steps=200
    scalelab train --config=configs/mamba.py:params=1e6,data=my_corpus

Arguments: size (xs | s | m | l: the recipe at widths 64 to 512 | 130m: the published shape), or params (target without
embeddings), steps, data, tokenizer, dtype as in `transformer`.
"""

from scalelab import recipe
from scalelab.schema import Config

PUBLISHED = {
    "130m": {
        "model.width": 768, "model.layers": 24, "model.blocks": (("mamba2", "none"),),
        "model.norm_eps": 1e-5, "model.mamba2.chunk": 256, "data.seq_len": 2048, "optim.lr": 6e-4,
    },
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    return recipe.config("mamba2", arg, PUBLISHED)
