"""Which sequence mixers and channel mixers there are, and a config's blocks resolved against them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from scalelab.errors import BadInput
from scalelab.models import recursion
from scalelab.models.attention import Attention
from scalelab.models.delta import DeltaNet, GatedDeltaNet
from scalelab.models.linear_attention import GLA, Lightning
from scalelab.models.mamba import Mamba, Mamba2
from scalelab.models.mlp import MLP
from scalelab.models.moe import MoE
from scalelab.models.part import ChannelMixer, Mixer
from scalelab.models.slstm import SLSTM
from scalelab.models.spec import BlockSpec, RecursionOptions, Spec, options
from scalelab.models.xlstm import MLSTM, MLSTMUp
from scalelab.parametrization import INITS, PARAMETRIZATIONS
from scalelab.schema import at_least, between, choice

# A name is also that of the mixer's section in `config.model`.
MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention, "mamba": Mamba, "mamba2": Mamba2,
    "mlstm": MLSTM, "mlstm_up": MLSTMUp, "slstm": SLSTM,
    "gla": GLA, "deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet, "lightning": Lightning,
}  # fmt: skip
CHANNELS: dict[str, type[ChannelMixer]] = {"mlp": MLP, "moe": MoE}


def validate(config: Any) -> None:
    """Raises `BadInput` where `config`, the model section with its vocabulary known, is no possible model, and where
    a section that no block uses has values that no block could."""
    resolve(config)
    for name, part in {**MIXERS, **CHANNELS}.items():
        values = options(part.Options, config[name], {}, f"config.model.{name}")
        part.check(values, f"model.{name}", 0)  # what every number divides: only blocks must fit the width


def with_vocabulary(config: Any, tokens: int) -> Any:
    """The model section with its vocabulary known: by default the tokenizer's, and never smaller. Raises `BadInput`."""
    config = config.copy_and_resolve_references()
    config.vocab_size = config.vocab_size or tokens
    if config.vocab_size < tokens:
        raise BadInput("config.model.vocab_size", config.vocab_size, f"the tokenizer has {tokens} tokens; 0 takes that")
    validate(config)
    return config.lock()


def resolve(config: Any) -> Spec:
    """The model section -> Spec. Raises `BadInput`, naming the field, the value and what would do."""
    for name in ("vocab_size", "width", "layers", "loss_chunk"):
        at_least(f"model.{name}", config[name], 1)
    for name in ("norm_eps", "init_std"):
        at_least(f"model.{name}", config[name], 0, above=True)
    for name in ("positions", "logit_cap"):
        at_least(f"model.{name}", config[name], 0)
    at_least("model.parscale.streams", config.parscale.streams, 1)
    at_least("model.parscale.prefix", config.parscale.prefix, 1)
    between("model.parscale.smoothing", config.parscale.smoothing, 0, 1)
    choice("model.norm", config.norm, ("rmsnorm", "layernorm", "layernorm_gain"))
    choice("model.placement", config.placement, ("pre", "post", "peri", "out"))
    choice("model.init", config.init, INITS)
    _check_parametrization(config)
    choice("model.compute_dtype", config.compute_dtype, ("bfloat16", "float32"))
    choice("model.remat", config.remat, ("none", "dots", "full"))
    prefix, period, suffix = (
        tuple(_block(config, entry, f"model.{part}[{i}]") for i, entry in enumerate(config[part]))
        for part in ("prefix", "blocks", "suffix")
    )
    if not period:
        raise BadInput("config.model.blocks", (), "needs at least one block, such as ('attention', 'mlp')")
    outside = len(prefix) + len(suffix)
    repeats, rest = divmod(config.layers - outside, len(period))
    if rest or repeats < 1:
        what = f"{outside} (prefix and suffix) plus a multiple of {len(period)} (blocks)"
        raise BadInput("config.model.layers", config.layers, f"must be {what}, such as {outside + len(period)}")
    recursions = options(RecursionOptions, config.recursion, {}, "config.model.recursion")
    recursions = dataclasses.replace(recursions, capacities=tuple(recursions.capacities))
    recursion.check(recursions, period)
    first, stride = len(prefix), len(period)
    prefix, period, suffix = (
        tuple(dataclasses.replace(block, layer=start + i, stride=step) for i, block in enumerate(blocks))
        for blocks, start, step in (
            (prefix, 0, 1),
            (period, first, stride),
            (suffix, first + stride * repeats * recursions.count, 1),
        )
    )
    spec = Spec(
        vocab_size=config.vocab_size,
        width=config.width,
        prefix=prefix,
        period=period,
        repeats=repeats,
        suffix=suffix,
        norm=config.norm,
        norm_eps=config.norm_eps,
        placement=config.placement,
        embed_norm=config.embed_norm,
        positions=config.positions,
        tied_embeddings=config.tied_embeddings,
        logit_cap=config.logit_cap,
        init_kind=config.init,
        init_std=config.init_std,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        loss_chunk=config.loss_chunk,
        streams=config.parscale.streams,
        stream_prefix=config.parscale.prefix,
        stream_smoothing=config.parscale.smoothing,
        base=None,
        base_layers=config.layers,
        depth_scaled=False,
        embed_multiplier=1.0,
        logit_multiplier=1.0,
        recursion=recursions,
    )
    if config.parametrization == "standard":
        return spec
    if recursions.count > 1 and config.mup.base_layers <= outside:
        remedy = f"must be above the {outside} layers of prefix and suffix, which the base model has too"
        raise BadInput("config.model.mup.base_layers", config.mup.base_layers, remedy)
    return dataclasses.replace(
        spec,
        base=dataclasses.replace(spec, width=config.mup.base_width),
        base_layers=config.mup.base_layers,
        depth_scaled=config.parametrization == "completep",
        embed_multiplier=config.mup.embed_multiplier,
        logit_multiplier=config.mup.logit_multiplier,
    )


# The fields of `model.mup` that the standard parametrisation does without.
UNSET = {"base_width": 0, "base_layers": 0, "base": (), "embed_multiplier": 1.0, "logit_multiplier": 1.0}


def _check_parametrization(config: Any) -> None:
    choice("model.parametrization", config.parametrization, PARAMETRIZATIONS)
    mup = config.mup
    if config.parametrization == "standard":
        for name, value in UNSET.items():
            if mup[name] != value:
                raise BadInput(f"config.model.mup.{name}", mup[name], "needs model.parametrization = mup or completep")
        return
    for name in ("base_width", "base_layers"):
        if mup[name] < 1:
            remedy = f"must be that of the model at which the learning rate was tuned, for {config.parametrization}"
            raise BadInput(f"config.model.mup.{name}", mup[name], remedy)
    for name in ("embed_multiplier", "logit_multiplier"):
        at_least(f"model.mup.{name}", mup[name], 0, above=True)
    used = {section for part in ("prefix", "blocks", "suffix") for entry in config[part] for section in entry[:2]}
    for entry in mup.base:
        pair = isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str)
        section, _, name = entry[0].partition(".") if pair else ("", "", "")
        if section not in used - {"none"} or not name:
            remedy = "must be ('section.field', value) with a section that the blocks use, such as "
            remedy += f"{', '.join(sorted(used - {'none'}))}"
            raise BadInput("config.model.mup.base", entry, remedy)


def _base_options(config: Any, name: str, part: type[Any], own: Any) -> Any:
    """The options in the base model of a part that has `own` here."""
    if config.parametrization == "standard":
        return None
    named = {field.split(".")[1]: value for field, value in config.mup.base if field.split(".")[0] == name}
    values = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    for field in part.grows:
        exact = values[field] * config.mup.base_width / config.width
        values[field] = round(exact)
        if field == "kv_heads":  # in no matrix's fan-in, and a lone one cannot be fewer
            values[field] = math.gcd(max(1, values[field]), values["heads"])
        elif field not in named and not math.isclose(exact, values[field], rel_tol=0.01):
            remedy = f"makes {name}.{field} = {exact:.3g} in the base model; say what it has there in model.mup.base: "
            raise BadInput("config.model.mup.base_width", config.mup.base_width, remedy + f"(('{name}.{field}', ...),)")
    base = options(part.Options, values, named, "config.model.mup.base")
    part.check(base, f"model.mup.base: {name}", config.mup.base_width)
    return base


def _block(config: Any, entry: Any, field: str) -> BlockSpec:
    shape = 'must be (mixer, channel mixer or "none"[, {option: value}])'
    if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
        raise BadInput(f"config.{field}", entry, shape)
    mixer, channel, changes = (*entry, {}) if len(entry) == 2 else entry
    if not isinstance(mixer, str) or not isinstance(channel, str) or not isinstance(changes, Mapping):
        raise BadInput(f"config.{field}", entry, shape)
    choice(f"{field}: mixer", mixer, MIXERS)
    choice(f"{field}: channel mixer", channel, (*CHANNELS, "none"))
    chosen = options(MIXERS[mixer].Options, config[mixer], changes, f"config.{field}")
    MIXERS[mixer].check(chosen, f"{field}" if changes else f"model.{mixer}", config.width)
    mixer_base = _base_options(config, mixer, MIXERS[mixer], chosen)
    if channel == "none":
        return BlockSpec(mixer, chosen, channel, None, mixer_base)
    channel_options = options(CHANNELS[channel].Options, config[channel], {}, f"config.model.{channel}")
    CHANNELS[channel].check(channel_options, f"model.{channel}", config.width)
    channel_base = _base_options(config, channel, CHANNELS[channel], channel_options)
    return BlockSpec(mixer, chosen, channel, channel_options, mixer_base, channel_base)
