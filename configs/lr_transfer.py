"""Does the best learning rate stay where it is as a model widens? A grid of learning rates at several widths.

    scalelab plan  --config=lr_transfer:family=transformer
    scalelab sweep --config=lr_transfer:family=mamba2,widths=32:64:128 --name=lr-mamba2

Widths share the shape of the least one, wider by heads and inner widths alone, and its depth; under mup and completep
it is the base. Every width is trained on the same tokens, a constant number of them: the question is the width, not the
budget. The least width is trained under `standard` only, of which the other parametrisations are the same run there.

Arguments: family (of the recipe), parametrizations, widths, lrs (of the least width; the same ones at all), layers (0:
the recipe's at the least width), steps, seeds (repeats), data.
"""

from collections.abc import Iterator
from typing import Any

from scalelab import recipe
from scalelab.config import base, override, parse_arg
from scalelab.errors import BadInput
from scalelab.schema import Config

DEFAULTS: dict[str, Any] = {
    "family": "transformer", "parametrizations": ("standard", "mup"), "widths": (32, 64, 128),
    "lrs": (2.0**-9, 2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5, 2.0**-4), "layers": 0, "steps": 150, "seeds": 1, "data": "",
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    args = parse_arg(arg, **DEFAULTS)
    changes: dict[str, Any] = {
        "train.steps": args.steps, "model.compute_dtype": "float32", "data.seq_len": 64, "data.batch_size": 8,
        "data.held_out_tokens": 32768, "train.eval_every": 1.0, "optim.eps": 1e-12, "checkpoint.final": "nothing",
    }  # fmt: skip
    if args.data:
        found = recipe.source(args.data)
        changes["data.sources"] = {found["kind"]: found}
    return override(base(), {**_shape(args, min(args.widths)), **changes}).lock()


def _shape(args: Any, width: int) -> recipe.Shape:
    found = recipe.widened(args.family, width, min(args.widths))
    return found | ({"model.layers": args.layers} if args.layers else {})


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    args = parse_arg(arg, **DEFAULTS)
    for name in ("steps", "seeds"):
        if args[name] < 1:
            raise BadInput(f"config argument {name}", args[name], "must be at least 1")
    smallest = min(args.widths)
    for width in sorted(args.widths):
        kinds = args.parametrizations if width > smallest else ("standard",)
        for kind in kinds:
            shape = recipe.transferred(kind, _shape(args, width), _shape(args, smallest))
            for lr in args.lrs:
                for seed in range(args.seeds):
                    yield {**shape, "optim.lr": lr, "seed": seed}
