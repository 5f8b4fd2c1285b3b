"""Linear attention: GLA (Yang et al. 2023), DeltaNet (Yang et al. 2024), Gated DeltaNet and Lightning attention.

    scalelab train --config=linear:kind=gated_deltanet,size=s,steps=200
    scalelab train --config=linear:kind=deltanet,params=1e6,data=my_corpus --config.model.deltanet.negative=True

Arguments: kind (gla | deltanet | gated_deltanet | lightning), size (xs | s | m | l: the recipe at widths 64 to 512; of
gla and deltanet also 340m | 1.3b: the papers' shapes), or params (target without embeddings), steps, data, tokenizer,
dtype as in `transformer`.
"""

from scalelab import recipe
from scalelab.config import parse_arg
from scalelab.errors import BadInput
from scalelab.schema import Config


def _published(kind: str, width: int, heads: int) -> recipe.Shape:
    return {
        "model.width": width, "model.layers": 24, "model.blocks": ((kind, "mlp"),), "model.tied_embeddings": False,
        "model.mlp.hidden": -(-8 * width // 768) * 256, f"model.{kind}.heads": heads, f"model.{kind}.chunk": 64,
        "data.seq_len": 2048, "optim.lr": 3e-4,
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, recipe.Shape]] = {
    "gla": {"340m": _published("gla", 1024, 4), "1.3b": _published("gla", 2048, 4)},
    "deltanet": {"340m": _published("deltanet", 1024, 8), "1.3b": _published("deltanet", 2048, 16)},
    "gated_deltanet": {},
    "lightning": {},
}


def get_config(arg: str = "") -> Config:
    kind = parse_arg(arg, kind="gla", **recipe.ARGUMENTS).kind
    if kind not in PUBLISHED:
        raise BadInput("config argument kind", kind, f"must be one of {', '.join(PUBLISHED)}")
    return recipe.config(kind, arg, PUBLISHED[kind], kind=kind)
