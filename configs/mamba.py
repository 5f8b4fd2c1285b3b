"""Mamba-1 (Gu & Dao 2023) and Mamba-2 (Dao & Gu 2024): stacks of selective recurrences, no attention and no MLP.

    scalelab train --config=mamba:size=s,steps=200
    scalelab train --config=mamba:version=1,size=s,steps=200
    scalelab train --config=configs/mamba.py:params=1e6,data=my_corpus

Arguments: version (2 | 1), size (xs | s | m | l: the recipe at widths 64 to 512 | 130m: the published shape), or
params (target without embeddings), steps, data, tokenizer, dtype as in `transformer`.
"""

from scalelab import recipe
from scalelab.config import parse_arg
from scalelab.errors import BadInput
from scalelab.schema import Config

SHARED = {"model.width": 768, "model.layers": 24, "model.norm_eps": 1e-5, "data.seq_len": 2048, "optim.lr": 6e-4}
PUBLISHED = {
    1: {"130m": {**SHARED, "model.blocks": (("mamba", "none"),)}},
    2: {"130m": {**SHARED, "model.blocks": (("mamba2", "none"),), "model.mamba2.chunk": 256}},
}


def get_config(arg: str = "") -> Config:
    version = parse_arg(arg, version=2, **recipe.ARGUMENTS).version
    if version not in PUBLISHED:
        raise BadInput("config argument version", version, "must be 1 or 2")
    return recipe.config("mamba" if version == 1 else "mamba2", arg, PUBLISHED[version], version=2)
