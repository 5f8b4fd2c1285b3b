"""Recipes: a family and a target size -> shape, learning rate and batch, as dotted overrides of a config.

Starting points, not laws: a study that is to be believed tunes them at each scale, or shows that it need not. A family
is a function of the width, which sets everything else; sizes are found by counting exactly.
"""

from __future__ import annotations

import functools
import inspect
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from scalelab import flops
from scalelab.config import base, flatten, override, parse_arg
from scalelab.errors import BadInput
from scalelab.models.registry import CHANNELS, MIXERS
from scalelab.parametrization import PARAMETRIZATIONS
from scalelab.schema import Config, at_least, choice

Shape = dict[str, Any]  # dotted overrides

WIDTHS = (*range(16, 64, 8), *range(64, 256, 16), *range(256, 16385, 64))


def _head_width(width: int) -> int:
    return 64 if width % 64 == 0 and width >= 256 else next(d for d in (32, 16, 8) if width % d == 0)


def transformer(width: int) -> Shape:
    """A SwiGLU Transformer: one layer per 64 of width (at least 2), F = 8/3 D."""
    head_dim = _head_width(width)
    grain = 64 if width >= 256 else 16
    heads = width // head_dim
    return {
        "family": "transformer",
        "model.width": width,
        "model.layers": max(2, round(width / 64)),
        "model.attention.heads": heads,
        "model.attention.kv_heads": heads,
        "model.attention.head_dim": head_dim,
        "model.mlp.hidden": math.ceil(8 * width / 3 / grain) * grain,
        # At small widths N(0, 0.02) is far too small a start, and QK-norm shortens the plateau before attention forms:
        # at width 64 and 5e11 FLOP the held-out loss fell from 2.03 to 1.75 with the one and to 1.69 with both.
        "model.init": "fan_in",
        "model.attention.qk_norm": True,
    }


def moe(width: int) -> Shape:
    """The Transformer's shape with as much MLP active, k Fe = 8/3 D: 2 of 16 experts, or 8 of 64 from width 512 on."""
    experts, k = (64, 8) if width >= 512 else (16, 2)
    grain = 64 if width >= 256 else 8
    attention = {name: value for name, value in transformer(width).items() if name != "model.mlp.hidden"}
    return {
        **attention,
        "family": "moe",
        "model.blocks": (("attention", "moe"),),
        "model.moe.experts": experts,
        "model.moe.top_k": k,
        "model.moe.hidden": math.ceil(8 * width / 3 / k / grain) * grain,
    }


def mor(width: int, recursions: int = 3) -> Shape:
    """The Transformer's shape as a Mixture-of-Recursions: a first and a last layer of their own, and between them as
    many shared ones as make the layers of a pass those of the Transformer, at least one."""
    plain = transformer(width)
    return plain | {
        "family": "mor",
        "model.layers": 2 + max(1, round((plain["model.layers"] - 2) / recursions)),
        "model.prefix": (("attention", "mlp"),),
        "model.suffix": (("attention", "mlp"),),
        "model.recursion.count": recursions,
    }


def mamba(width: int) -> Shape:
    """Mamba-1: a mixer has half of a Transformer layer's parameters, hence twice the layers."""
    return {
        "family": "mamba",
        "model.width": width,
        "model.layers": max(4, 2 * round(width / 64)),
        "model.blocks": (("mamba", "none"),),
        "model.norm_eps": 1e-5,
    }


def mamba2(width: int) -> Shape:
    """Mamba-2: a mixer has half of a Transformer layer's parameters, hence twice the layers."""
    return {
        "family": "mamba2",
        "model.width": width,
        "model.layers": max(4, 2 * round(width / 64)),
        "model.blocks": (("mamba2", "none"),),
        "model.norm_eps": 1e-5,
        "model.mamba2.head_dim": 64 if width >= 256 else 16,
        "model.mamba2.state": 128 if width >= 512 else 64 if width >= 128 else 32,
    }


XLSTM = ("mlstm", "mlstm_up", "slstm")


def xlstm(width: int, mixer: str = "mlstm") -> Shape:
    """The large xLSTM's block: mLSTM and SwiGLU, one layer per 64 of width, F = 8/3 D.

    mixer=mlstm_up or slstm: the paper's blocks, sLSTM with a GeGLU of F = 1.3 D. Half of the parameters, hence twice
    the layers.
    """
    choice("argument mixer", mixer, XLSTM)
    grain = 64 if width >= 256 else 16
    found = {
        "family": "xlstm" if mixer == "mlstm" else mixer,
        "model.width": width,
        "model.blocks": ((mixer, "none" if mixer == "mlstm_up" else "mlp"),),
        "model.init": "small",
        f"model.{mixer}.heads": 4 if width < 2048 else 8,
    }
    if mixer == "mlstm":
        return found | {
            "model.layers": max(2, round(width / 64)),
            "model.mlp.hidden": math.ceil(8 * width / 3 / grain) * grain,
        }
    found |= {
        "model.layers": max(4, 2 * round(width / 64)),
        "model.norm": "layernorm_gain",
        "model.norm_eps": 1e-5,
    }
    if mixer == "slstm":
        found |= {"model.mlp.kind": "geglu", "model.mlp.hidden": math.ceil(1.3 * width / grain) * grain}
    return found


def _with_mlp(family: str, width: int, hidden: float) -> Shape:
    """Layers of a mixer and a SwiGLU of F = hidden * width, one per 64 of width (at least 2): with the mixer's own
    parameters about 12 D^2, as the Transformer's."""
    grain = 64 if width >= 256 else 16
    return {
        "family": family,
        "model.width": width,
        "model.layers": max(2, round(width / 64)),
        "model.blocks": ((family, "mlp"),),
        "model.init": "fan_in",
        "model.mlp.hidden": math.ceil(hidden * width / grain) * grain,
    }


def gla(width: int) -> Shape:
    """GLA: 4 heads at any width, as published."""
    return _with_mlp("gla", width, 8 / 3) | {"model.gla.heads": 4}


def deltanet(width: int) -> Shape:
    return _with_mlp("deltanet", width, 8 / 3) | {"model.deltanet.heads": width // _head_width(width)}


def gated_deltanet(width: int) -> Shape:
    """Gated DeltaNet: keys of 3/4 D, values of 3/2 D; a mixer has 6 D^2 parameters. From width 256 on heads of 64 x
    128, as many as come nearest: on a GPU heads of 48 x 96 are padded, and passes over channels that are no multiple of
    64 take several times as long (H100: a convolution's backward pass 0.38 ms, by its bytes 0.03)."""
    d = _head_width(width)
    heads, key_dim = (round(3 * width / 256), 64) if d == 64 else (width // d, 3 * d // 4)
    section = "model.gated_deltanet"
    return _with_mlp("gated_deltanet", width, 2) | {
        f"{section}.heads": heads,
        f"{section}.value_heads": heads,
        f"{section}.key_dim": key_dim,
        f"{section}.value_dim": 2 * key_dim,
    }


def lightning(width: int) -> Shape:
    """Lightning attention: a mixer has 5 D^2 parameters. At least 3 heads: each has one fixed decay, and a model that
    remembers over one length alone is 0.2 to 0.3 nats worse (one against four, widths 16 and 32, Python source)."""
    d = _head_width(width)
    d = d if width // d >= 3 else width // 4
    return _with_mlp("lightning", width, 7 / 3) | {"model.lightning.heads": width // d, "model.lightning.head_dim": d}


def hybrid(width: int, mixer: str = "gated_deltanet", every: int = 4, window: int = 0, rope: bool = True) -> Shape:
    """The layers of a family, and attention with an MLP at every m-th one (layer m, 2m, ... counted from 1).

    `window` is that of the attention; of a Transformer, whose every m-th layer sees everything, that of the others.
    """
    choice("argument mixer", mixer, [name for name in FAMILIES if name not in ("hybrid", "mor")])
    at_least("argument every", every, 1)
    at_least("argument window", window, 1 if mixer == "transformer" else 0)
    base = {**transformer(width), **FAMILIES[mixer](width)}
    own, attention = base.get("model.blocks", (("attention", "mlp"),))[0], ("attention", "mlp")
    if mixer == "transformer":
        own = (*own, {"window": window})
    elif window:
        attention = (*attention, {"window": window})
    layers = max(every, base["model.layers"])
    return base | {
        "family": "hybrid",
        "model.layers": layers,
        "model.blocks": (own,) * (every - 1) + (attention,),
        "model.suffix": (own,) * (layers % every),
        "model.attention.rope_theta": 10000.0 if rope else 0.0,
    }


FAMILIES: dict[str, Callable[..., Shape]] = {
    "transformer": transformer,
    "moe": moe,
    "mor": mor,
    "mamba": mamba,
    "mamba2": mamba2,
    "xlstm": xlstm,
    "gla": gla,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "lightning": lightning,
    "hybrid": hybrid,
}


def shape(family: str, width: int, **options: Any) -> Shape:
    """The family's shape at a width, with a learning rate; `options` are the family's own. Raises `BadInput` for an
    unknown family, and for a width that is no multiple of 8."""
    if width < 8 or width % 8:
        raise BadInput("width", width, "must be a multiple of 8, at least 8")
    return {**_family(family)(width, **options), "optim.lr": learning_rate(width, family)}


def with_options(reference: str) -> tuple[str, dict[str, Any]]:
    """A family and its options, as for `shape`, from `hybrid:mixer=mamba2,every=2`. Raises `BadInput`."""
    family, _, arg = reference.partition(":")
    _, *parameters = inspect.signature(_family(family)).parameters.values()
    return family, parse_arg(arg, **{p.name: p.default for p in parameters}).to_dict()


def _family(name: str) -> Callable[..., Shape]:
    if name not in FAMILIES:
        raise BadInput("family", name, f"must be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def defaults(families: Iterable[str]) -> Shape:
    """Every field that one of the families' shapes sets, at its default: beneath each of them in a sweep over several,
    whose common config is that of one."""
    fields = flatten(base().to_dict())
    return {name: fields[name] for family in families for name in shape(family, WIDTHS[-1])}


@functools.cache
def params(family: str, width: int, **options: Any) -> int:
    """Active parameters without embeddings of the family's shape at a width."""
    model = override(base(), {**shape(family, width, **options), "model.vocab_size": 256}).model
    counts = flops.counts(model)
    return counts.active - counts.embedding - counts.unembedding


def sized(family: str, target: float, **options: Any) -> Shape:
    """The family's shape whose active parameters without embeddings come nearest to `target` (in ratio).

    Widths are multiples of 8 up to 64, of 16 up to 256, of 64 above. Raises `BadInput` beyond them.
    """
    at_least("argument params", target, 0, above=True)
    smallest, largest = (params(family, width, **options) for width in (WIDTHS[0], WIDTHS[-1]))
    if target < smallest / 2:
        raise BadInput("params", target, f"the smallest {family} of the recipe has {smallest} parameters")
    if target > largest * 2:
        raise BadInput("params", target, f"the largest {family} of the recipe has {largest:.3g} parameters")
    low, high = 0, len(WIDTHS) - 1  # counts grow with the width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if params(family, WIDTHS[middle], **options) <= target else (low, middle)
    width = min(WIDTHS[low], WIDTHS[high], key=lambda w: abs(math.log(params(family, w, **options) / target)))
    return shape(family, width, **options)


def for_budget(family: str, budget: float, ratio: float = 20.0, **options: Any) -> Shape:
    """The family's shape for a training budget in FLOP: C = 6 N D, with D = ratio * N tokens (about 20: Hoffmann et al.
    2022; a law of one's own says better) and N active parameters without embeddings. How many steps spend it, by the
    exact count: `sweep.steps_for`."""
    at_least("argument budget", budget, 0, above=True)
    at_least("argument ratio", ratio, 0, above=True)
    return sized(family, math.sqrt(budget / (6 * ratio)), **options)


LOWER = ("xlstm", "moe", "gla", "lightning")  # families whose best rate is 0.6 of the rule's


def learning_rate(width: int, family: str = "transformer") -> float:
    """Peak AdamW learning rate: 0.5 / width, at most 0.02; 0.6 times that for the families in `LOWER`.

    Measured for the Transformer at widths 24, 40 and 64 (bytes of Python source, 2e11 FLOP, 512 tokens a batch, fan-in
    initialisation): the best of a grid of factors 2 was 0.013 to 0.026, 0.010 to 0.020 and 0.008. At 768 the rule gives
    the usual 6.5e-4. The other families: `experiments/2026-11-22-family-lr`, at two widths from 16 to 48.
    """
    return float(f"{(0.6 if family in LOWER else 1.0) * min(0.02, 0.5 / width):.3g}")


# ------------------------------------------------------------------------------------------------ parametrisation


def widened(family: str, width: int, base_width: int, **options: Any) -> Shape:
    """The family's shape at `base_width`, made wider in the proportions of muP: heads and inner widths grow with the
    width; depth, head widths, states and numbers of experts stay. Raises `BadInput` where the heads would not be
    whole. The learning rate is that of the base."""
    found = shape(family, base_width, **options)
    defaults = base()
    for section, part in {**MIXERS, **CHANNELS}.items():
        for name in part.grows:
            field = f"model.{section}.{name}"
            value = found.get(field, defaults.model[section][name]) * width
            if value % base_width and name != "hidden":
                raise BadInput("width", width, f"makes {section}.{name} = {value / base_width:.3g}")
            found[field] = round(value / base_width)
    return found | {"model.width": width}


def transferred(kind: str, found: Shape, base_shape: Shape) -> Shape:
    """A shape under `kind` of parametrisation, with another one as its base, whose learning rate it takes."""
    choice("argument parametrization", kind, PARAMETRIZATIONS)
    if kind == "standard":
        return found
    defaults, differs = base().model, []
    used = {section for block in found.get("model.blocks", defaults.blocks) for section in block[:2]}
    width, base_width = found["model.width"], base_shape["model.width"]
    for section, part in {**MIXERS, **CHANNELS}.items():
        for name, default in defaults[section].items() if section in used else ():
            own, there = (s.get(f"model.{section}.{name}", default) for s in (found, base_shape))
            if there * width != own * base_width if name in part.grows else there != own:
                differs.append((f"{section}.{name}", there))
    return found | {
        "model.parametrization": kind,
        "model.mup.base_width": base_width,
        "model.mup.base_layers": base_shape["model.layers"],
        "model.mup.base": tuple(differs),
        "optim.lr": base_shape["optim.lr"],
    }


# ------------------------------------------------------------------------------------------------ configs

SIZES = {"xs": 64, "s": 128, "m": 256, "l": 512}  # widths


ARGUMENTS = {
    "size": "s", "params": 0.0, "steps": 1000, "data": "", "tokenizer": "bytes", "dtype": "bfloat16",
    "parametrization": "standard", "base": SIZES["xs"],
}  # fmt: skip


def config(
    family: str, arg: str, published: Mapping[str, Shape], *, options: Mapping[str, Any] | None = None, **others: Any
) -> Config:
    """What the `get_config(arg)` of a family's file gives: a size of the recipe, or one of the `published` shapes.

    Arguments: size, or params (target without embeddings, active ones), steps, data (a text file or folder, a folder of
    token shards, synthetic[:spec] or probe:spec; default: the source of Python's standard library), tokenizer (for
    text), dtype, parametrization (standard | mup | completep) and for the last two base, the width of the recipe's
    shape from which learning rate, decay and initialisation carry over; `others` are those that the file itself has
    read, and `options` go to the family's recipe.
    """
    options = options or {}
    args = parse_arg(arg, **ARGUMENTS, **others)
    given = {item.strip().partition("=")[0] for item in arg.split(",")}
    if args.params and "size" in given:
        raise BadInput("config argument size", args.size, f"goes without params = {args.params:g}")
    if args.parametrization == "standard" and "base" in given:
        raise BadInput("config argument base", args.base, "needs parametrization = mup or completep")
    if args.size not in (*SIZES, *published):
        raise BadInput("config argument size", args.size, f"must be one of {', '.join((*SIZES, *published))}")
    if args.params:
        changes = sized(family, args.params, **options)
    elif args.size in published:
        changes = {"family": family, **published[args.size]}
    else:
        changes = shape(family, SIZES[args.size], **options)
    if args.parametrization != "standard":
        changes = transferred(args.parametrization, changes, shape(family, args.base, **options))
    changes |= {"train.steps": args.steps, "model.compute_dtype": args.dtype, "data.tokenizer": args.tokenizer}
    conf = override(base(), changes)
    if args.data:
        found = source(args.data)
        # Named by its kind, not by its path: the name is part of what a run is, where the text lies is not.
        conf = override(conf, {"data.sources": {found["kind"]: found}})
    return conf.lock()


def source(reference: str) -> dict[str, str]:
    """What a path holds: shards have a manifest; anything else is text. `synthetic:SPEC` and `probe:SPEC` are no paths;
    in SPEC colons stand for commas."""
    kind, _, spec = reference.partition(":")
    if kind in ("synthetic", "probe"):
        return {"kind": kind, "path": spec.replace(":", ",")}
    shards = (pathlib.Path(reference) / "manifest.json").is_file()
    return {"kind": "tokens" if shards else "text", "path": reference}
