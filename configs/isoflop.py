"""An IsoFLOP sweep: several sizes at each of several budgets (Hoffmann et al. 2022, approach 2), of one
family or several.

    scalelab plan  --config=isoflop
    scalelab sweep --config=isoflop:budgets=1e12:2e12:4e12,sizes=5 --jobs=2
    scalelab sweep --config=isoflop:families=transformer:xlstm:deltanet,budgets=1e12:4e12 --jobs=2
    scalelab report runs/sweeps/isoflop-*.json

Arguments: families (of the recipe, by colons), budgets (training FLOP, exact convention, by colons), sizes (models per
budget), ratio (tokens per active non-embedding parameter around which the sizes are laid), span (largest over smallest
size of a budget), seeds (repeats), data, tokenizer and dtype as in `transformer`. All families get the same budgets,
sizes and, for a seed, the same batches. The defaults take some minutes on two cores.
"""

from collections.abc import Iterator
from typing import Any

from scalelab import recipe
from scalelab import sweep as sweeps
from scalelab.config import load_file, override, parse_arg
from scalelab.errors import BadInput
from scalelab.schema import Config

DEFAULTS: dict[str, Any] = {
    "families": ("transformer",), "budgets": (1.5e11, 3.75e11, 9e11), "sizes": 5, "ratio": 50.0, "span": 10.0,
    "seeds": 1, "data": "", "tokenizer": "bytes", "dtype": "float32",
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    args = parse_arg(arg, **DEFAULTS)
    config = load_file("transformer").get_config(f"data={args.data},tokenizer={args.tokenizer},dtype={args.dtype}")
    changes = {"data.seq_len": 128, "data.batch_size": 4, "data.held_out_tokens": 65536, "train.eval_every": 0.34}
    return override(config, changes).lock()


def sweep(arg: str = "") -> Iterator[dict[str, Any] | sweeps.Dropped]:
    args = parse_arg(arg, **DEFAULTS)
    for name, least in (("sizes", 1), ("seeds", 1), ("span", 1.0)):
        if args[name] < least:
            raise BadInput(f"config argument {name}", args[name], f"must be at least {least}")
    for name, value in (("ratio", args.ratio), *(("budgets", budget) for budget in args.budgets)):
        if value <= 0:
            raise BadInput(f"config argument {name}", value, "must be above 0")
    others = recipe.defaults(args.families)
    for family in args.families:
        for budget in args.budgets:
            for rank in range(args.sizes):
                place = rank / (args.sizes - 1) - 0.5 if args.sizes > 1 else 0.0
                for seed in range(args.seeds):
                    try:
                        # N times x: as many tokens fewer, so that their ratio falls by x^2.
                        shape = others | recipe.for_budget(family, budget, args.ratio * args.span ** (-2 * place))
                    except BadInput as error:
                        reason = f"budget = {budget:.3g}: too small; {error}"
                        yield sweeps.Dropped({"family": family, "budget": budget}, reason)
                        continue
                    yield {**shape, "seed": seed, "train.steps": sweeps.steps_for(budget)}
