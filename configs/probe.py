"""Probes: what an architecture can do, on tasks of `scalelab.data.probes` (tracking a state, recall, copying).

    scalelab probe --task parity --families slstm,deltanet,mamba,transformer
    scalelab sweep --config=probe:task=recall,families=transformer:mamba,seeds=3
    scalelab train --config=probe:task=copy,families=gla --config.optim.lr=3e-3

Arguments: task (parity | modular | recall, also mqar | copy), options (of the task, by colons: m=5:symbols=5), families
(by colons, see SHAPES below), size (what it is trained up to: a length, or pairs), width, layers, steps (0: the task's
own), batch (sequences), lr (0: by family), seeds (of initialisation and data, paired over families).

Defaults are minutes on two CPU cores. `deltanet` and `gated_deltanet` have eigenvalues down to -1 here, as tracking a
state needs; the `_positive` ones are the same without.
"""

from collections.abc import Callable, Iterator
from typing import Any

from scalelab import recipe
from scalelab.config import base, override, parse_arg
from scalelab.data import probes
from scalelab.errors import BadInput
from scalelab.schema import Config

DEFAULTS: dict[str, Any] = {
    "task": "parity", "options": "", "families": ("slstm", "deltanet", "mamba", "transformer"), "size": 0,
    "width": 0, "layers": 0, "steps": 0, "batch": 64, "lr": 0.0, "seeds": 1,
}  # fmt: skip
SIZES = {"parity": 20, "modular": 20, "recall": 8, "copy": 16}
OPTIONS = {"recall": "least=1,keys=16,values=16", "copy": "least=1"}  # unless they are given
STEPS = {"parity": 1000, "modular": 1000, "recall": 1200, "copy": 1200}
WIDTHS = {"parity": 32, "modular": 32, "recall": 64, "copy": 64}
# Peak learning rates; others 5e-3. The recurrent matrices of the sLSTM start at zero and have far to go; above 2e-3
# attention stays for long where it says any one of the values there are.
DELTA = ("deltanet", "deltanet_positive", "gated_deltanet", "gated_deltanet_positive")
LR = {"slstm": 1e-2, **dict.fromkeys(("transformer", "moe", "mor", "hybrid"), 2e-3), **dict.fromkeys(DELTA, 3e-3)}


def _shaped(family: str, **changes: Any) -> Callable[[int], recipe.Shape]:
    """The recipe's shape, as `family`, with fields of the model changed (`__` stands for the dot)."""
    dotted = {f"model.{name.replace('__', '.')}": value for name, value in changes.items()}
    kind = family.removesuffix("_positive")
    base = recipe.xlstm if kind == "slstm" else recipe.FAMILIES[kind]
    return lambda width: base(width) | {"family": family} | dotted


SHAPES: dict[str, Callable[[int], recipe.Shape]] = {
    **{family: _shaped(family) for family in recipe.FAMILIES},
    "slstm": _shaped("slstm", blocks=(("slstm", "mlp"),), slstm__heads=1),  # every channel hears every other
    "deltanet": _shaped("deltanet", deltanet__heads=4, deltanet__negative=True),
    "deltanet_positive": _shaped("deltanet_positive", deltanet__heads=4),
    "gated_deltanet": _shaped("gated_deltanet", gated_deltanet__negative=True),
    "gated_deltanet_positive": _shaped("gated_deltanet_positive"),
    "mor": _shaped("mor", suffix=()),  # a first layer, and the others shared
    "hybrid": _shaped("hybrid", blocks=(("gated_deltanet", "mlp"), ("attention", "mlp")), suffix=()),
}
CONVOLVED = ("slstm", "mamba", "mamba2", "deltanet", "gated_deltanet", "mlstm_up")
# A convolution lets a recurrence learn the answers of the first few positions by heart, from which training takes long
# to come away; for recall and copying it does what it is for.
NO_CONVOLUTION = {f"model.{mixer}.conv": 1 for mixer in CONVOLVED}


def get_config(arg: str = "") -> Config:
    args = _arguments(arg)
    given = [args.task, OPTIONS.get(args.task, ""), args.options.replace(":", ",")]
    task, seq_len = probes.parse(",".join(filter(None, given)), "config argument task").up_to(_size(args))
    return override(
        base(),
        {
            **_shape(args.families[0], args),
            "model.compute_dtype": "float32",
            "data.sources": {"probe": {"kind": "probe", "path": probes.spec(task)}},
            "data.seq_len": seq_len,
            "data.batch_size": args.batch,
            "data.held_out_tokens": 16384,
            "train.steps": args.steps or STEPS[args.task],
            "train.diverge_above": 20.0,  # ln V is small, and a spike is no end
            "optim.weight_decay": 0.0,
        },
    ).lock()


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    args = _arguments(arg)
    # Nothing of the first family, which `get_config` has, is left to the others.
    plain = base()
    unset = {field: plain[field] for field in _shape(args.families[0], args)}
    for family in args.families:
        for seed in range(args.seeds):
            yield {**unset, **_shape(family, args), "seed": seed, "data_seed": seed}


def _arguments(arg: str) -> Any:
    args = parse_arg(arg, **DEFAULTS)
    args.task = "recall" if args.task == "mqar" else args.task
    if args.task not in SIZES:
        raise BadInput("config argument task", args.task, f"must be one of {', '.join(SIZES)}")
    args.width = args.width or WIDTHS[args.task]
    for family in args.families:
        if family not in SHAPES:
            raise BadInput("config argument families", family, f"must be of {', '.join(SHAPES)}")
    for name, least in (("size", 0), ("steps", 0), ("layers", 0), ("lr", 0), ("seeds", 1), ("batch", 1)):
        if args[name] < least:
            raise BadInput(f"config argument {name}", args[name], f"must be at least {least}")
    return args


def _size(args: Any) -> int:
    return args.size or SIZES[args.task]


def _shape(family: str, args: Any) -> recipe.Shape:
    if args.width not in recipe.WIDTHS:
        raise BadInput(
            "config argument width", args.width, f"must be one of {', '.join(map(str, recipe.WIDTHS[:12]))}, .."
        )
    tracking = args.task in ("parity", "modular")
    shape = SHAPES[family](args.width)
    layers = args.layers or (1 if tracking and family not in ("hybrid", "mor") else 2)
    if all(channel == "none" for _, channel in shape.get("model.blocks", [("attention", "mlp")])):
        layers *= 2  # a mixer alone is half a layer
    if family.startswith("gated_deltanet"):
        heads, widths = {"heads": 4, "value_heads": 4}, {"key_dim": args.width // 4, "value_dim": args.width // 4}
        shape |= {f"model.gated_deltanet.{name}": value for name, value in (heads | widths).items()}
    return {
        **shape,
        **(NO_CONVOLUTION if tracking else {}),
        "model.attention.heads": 4,  # one head cannot both find the token before and look a key up
        "model.attention.kv_heads": 4,
        "model.attention.head_dim": args.width // 4,
        "model.layers": layers,
        "optim.lr": args.lr or LR.get(family, 5e-3),
    }
