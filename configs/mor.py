"""Mixture-of-Recursions: a Transformer whose middle layers are shared, and applied several times to ever fewer tokens.

    scalelab train --config=mor:size=s,steps=200
    scalelab train --config=configs/mor.py:recursions=2,params=1e6,data=my_corpus --config.model.recursion.alpha=0.2

Arguments: recursions (Nr, 3; capacities are linear, others by --config.model.recursion.capacities=(1.0,0.5,0.25)), size
(xs | s | m | l: the recipe at widths 64 to 512 | 360m: the paper's), or params (target without embeddings; shared ones
count once), steps, data, tokenizer, dtype, parametrization, base as in `transformer`.

360m: SmolLM-360M's shape, 32 layers a pass, of which 30 are 10 shared ones three times: 118M parameters without
embeddings, as in the paper (both figures from memory, unverified). Its learning rate is the recipe's; capacities are
not warmed up.
"""

from scalelab import recipe
from scalelab.config import parse_arg
from scalelab.errors import BadInput
from scalelab.schema import Config

OWN = {"recursions": 3}
PUBLISHED = {
    "360m": {
        "model.width": 960, "model.layers": 12, "model.attention.heads": 15, "model.attention.kv_heads": 5,
        "model.attention.head_dim": 64, "model.mlp.hidden": 2560, "model.norm_eps": 1e-5, "data.seq_len": 2048,
        "model.prefix": (("attention", "mlp"),), "model.suffix": (("attention", "mlp"),), "model.recursion.count": 3,
        "optim.lr": recipe.learning_rate(960),
    },
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    args = parse_arg(arg, **OWN, **recipe.ARGUMENTS)
    if args.recursions < 2:
        raise BadInput("config argument recursions", args.recursions, "must be at least 2; transformer has none")
    if args.size in PUBLISHED and args.recursions != 3:
        raise BadInput("config argument recursions", args.recursions, f"must be 3, those of size={args.size}")
    return recipe.config("mor", arg, PUBLISHED, options={"recursions": args.recursions}, **OWN)
