"""Hybrids: layers of a recurrent family, and attention at every m-th one.

    scalelab train --config=hybrid:mixer=gated_deltanet,every=4,size=s,steps=200
    scalelab train --config=hybrid:mixer=transformer,window=64,every=6,size=s

Arguments: mixer (a family of the recipe; transformer: sliding windows, every m-th layer without), every (m; Qwen3-Next
has 4, Jamba and MiniMax 8), window (of the attention layers, 0: none; of a transformer, of the other layers), rope
(False: attention without positions), size (xs | s | m | l: the recipe at widths 64 to 512), or params (target without
embeddings), steps, data, tokenizer, dtype as in `transformer`.
"""

from scalelab import recipe
from scalelab.config import override, parse_arg
from scalelab.schema import Config

OWN = {"mixer": "gated_deltanet", "every": 4, "window": 0, "rope": True}


def get_config(arg: str = "") -> Config:
    args = parse_arg(arg, **OWN, **recipe.ARGUMENTS)
    options = {name: args[name] for name in OWN}
    config = recipe.config("hybrid", arg, {}, options=options, **OWN)
    return override(config, {"family": f"{args.mixer}_hybrid"}).lock()
