"""The best peak learning rate of every family, beside the recipe's rule 0.5 / width.

    scalelab sweep --config=experiments/2026-11-22-family-lr/sweep.py --runs=runs/family-lr --jobs=16

Arguments: families (ten of the recipe), sizes (target parameters without embeddings), factors (of the rule's rate),
budget (training FLOP of each run), seeds.
"""

from collections.abc import Iterator
from typing import Any

from scalelab import recipe
from scalelab import sweep as sweeps
from scalelab.config import load_file, parse_arg

FAMILIES = (
    "transformer", "moe", "mamba", "mamba2", "xlstm", "gla", "deltanet", "gated_deltanet", "lightning", "hybrid",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "families": FAMILIES, "sizes": (1.4e4, 5.6e4), "factors": (0.25, 0.5, 1.0, 2.0, 4.0), "budget": 2e11, "seeds": 2,
}  # fmt: skip


def get_config(arg: str = "") -> Any:
    parse_arg(arg, **DEFAULTS)
    return load_file("isoflop").get_config("")


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    args = parse_arg(arg, **DEFAULTS)
    others = recipe.defaults(args.families)
    for family in args.families:
        for size in args.sizes:
            shape = others | recipe.sized(family, size)
            for factor in args.factors:
                for seed in range(args.seeds):
                    rate = float(f"{factor * recipe.learning_rate(shape['model.width']):.3g}")
                    steps = sweeps.steps_for(args.budget)
                    yield {**shape, "optim.lr": rate, "seed": seed, "data_seed": seed, "train.steps": steps}
