"""Where the norms of a residual branch stand (pre, post, peri, out), by depth and learning rate.

    scalelab sweep --config=experiments/2026-11-23-residual-placement/sweep.py --runs=runs/placement --jobs=16

Arguments: placements, depths (layers), rates (peak learning rates), width, steps, seeds.
"""

from collections.abc import Iterator
from typing import Any

from scalelab import recipe
from scalelab.config import load_file, parse_arg

DEFAULTS: dict[str, Any] = {
    "placements": ("pre", "post", "peri", "out"), "depths": (2, 8, 24), "rates": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "width": 32, "steps": 1000, "seeds": 2,
}  # fmt: skip


def get_config(arg: str = "") -> Any:
    parse_arg(arg, **DEFAULTS)
    return load_file("isoflop").get_config("")


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    args = parse_arg(arg, **DEFAULTS)
    for placement in args.placements:
        for depth in args.depths:
            for rate in args.rates:
                for seed in range(args.seeds):
                    yield {
                        **recipe.shape("transformer", args.width),
                        "model.layers": depth,
                        "model.placement": placement,
                        "optim.lr": rate,
                        "seed": seed,
                        "data_seed": seed,
                        "train.steps": args.steps,
                    }
