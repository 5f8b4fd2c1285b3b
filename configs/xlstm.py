"""xLSTM: the large models' block, mLSTM and SwiGLU (Beck et al. 2025), or one of the paper's (Beck et al. 2024).

    scalelab train --config=xlstm:size=s,steps=200
    scalelab train --config=configs/xlstm.py:params=1e6,data=my_corpus

Arguments: size (xs | s | m | l: the recipe at widths 64 to 512 | the published shapes, 165m | 1.3b | 7b, and with
mixer=mlstm_up the 125m of the first paper's xLSTM[1:0]), or params (target without embeddings), steps, data, tokenizer,
dtype as in `transformer`. mixer (mlstm | mlstm_up | slstm): every layer's; `model.blocks` mixes them.
"""

from typing import Any

from scalelab import recipe
from scalelab.config import parse_arg
from scalelab.schema import Config


def _published(width: int, layers: int, heads: int, hidden: int, lr: float) -> dict[str, Any]:
    return {
        "model.width": width, "model.layers": layers, "model.blocks": (("mlstm", "mlp"),), "model.init": "small",
        "model.tied_embeddings": False, "model.logit_cap": 30.0, "model.mlp.hidden": hidden,
        "model.mlstm.heads": heads, "data.seq_len": 2048, "optim.lr": lr, "optim.clip": 0.5,
    }  # fmt: skip


OWN = {"mixer": "mlstm"}
PUBLISHED = {
    "mlstm": {
        "165m": _published(768, 12, 4, 2112, 1e-3),
        "1.3b": _published(2048, 24, 4, 5504, 7e-4),
        "7b": _published(4096, 32, 8, 10944, 5e-4),
    },
    # Also the recipe's shape: 24 blocks that have half of a Transformer layer's parameters each.
    "mlstm_up": {"125m": {**recipe.xlstm(768, "mlstm_up"), "data.seq_len": 2048, "optim.lr": 1e-3}},
}


def get_config(arg: str = "") -> Config:
    mixer = parse_arg(arg, **OWN, **recipe.ARGUMENTS).mixer
    return recipe.config("xlstm", arg, PUBLISHED.get(mixer, {}), options={"mixer": mixer}, **OWN)
