"""A pre-norm SwiGLU Transformer with rotary attention (Llama's block).

    scalelab train --config=transformer:size=s,steps=200
    scalelab train --config=configs/transformer.py:size=m,data=my_corpus --config.optim.lr=1e-3

Arguments: size (xs | s | m | l: the recipe at widths 64 to 512 | 165m: a published shape), or params (target without
embeddings), steps, data (a text file or folder, a folder of token shards, or synthetic[:spec]; default: the source of
Python's standard library), tokenizer (for text), dtype, parametrization (standard | mup | completep) and base (width of
the recipe's shape from which the last two carry learning rate, decay and initialisation over; 64).
"""

from scalelab import recipe
from scalelab.schema import Config

PUBLISHED = {
    "165m": {  # xlstm-jax's Llama: H = 6, F = 2048, untied
        "model.width": 768, "model.layers": 12, "model.attention.heads": 6, "model.attention.kv_heads": 6,
        "model.attention.head_dim": 128, "model.mlp.hidden": 2048, "model.tied_embeddings": False,
        "data.seq_len": 2048, "optim.lr": 6.51e-4,
    },
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    return recipe.config("transformer", arg, PUBLISHED)
