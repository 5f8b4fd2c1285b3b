"""Reading and writing folders in the Hugging Face layout, by what the layouts declare."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scalelab import models
from scalelab.config import base, override
from scalelab.errors import BadInput
from scalelab.exchange import decoders, experts, recurrent
from scalelab.exchange.files import Entry, Weights, read_json, write_folder
from scalelab.exchange.layout import Layout, Ours, Piece, Theirs, flat, nested, present
from scalelab.models.block import Block
from scalelab.models.layers import scaled
from scalelab.models.lm import LanguageModel
from scalelab.models.registry import resolve
from scalelab.models.spec import Spec
from scalelab.parametrization import Tensor
from scalelab.schema import Config

LAYOUTS = {
    layout.model_type: layout
    for layout in (
        decoders.GPT2, decoders.LLAMA, decoders.MISTRAL, decoders.QWEN2, decoders.QWEN3, decoders.OLMO2,
        experts.MIXTRAL, experts.QWEN3_MOE, recurrent.MAMBA, recurrent.MAMBA2, recurrent.XLSTM,
    )
}  # fmt: skip
OF_MIXER = {"mamba": recurrent.MAMBA, "mamba2": recurrent.MAMBA2, "mlstm": recurrent.XLSTM}
SHARD_BYTES = 5 * 10**9
MOST_LAYERS = 10_000  # each is looked at by itself: a number that is none would take for ever

# ------------------------------------------------------------------------------------------------ reading


def from_hf(folder: str | pathlib.Path) -> tuple[Config, Any]:
    """A folder of config.json and safetensors (one file, or shards and their index) -> (model section, parameters).

    Parameters are float32 whatever the file holds, and so is `compute_dtype`; set it to bfloat16 to compute as most
    such models were trained. Raises `BadInput` for what cannot be expressed here: nothing is left out silently.
    """
    folder = pathlib.Path(folder)
    document = read_json(folder / "config.json")
    config = read_config(document)
    layout, spec = LAYOUTS[document["model_type"]], resolve(config)
    with Weights(folder, layout.base) as weights:
        params = read_params(weights, layout, spec)
    return config, params


def read_config(document: Mapping[str, Any]) -> Config:
    """config.json -> model section."""
    kind = document.get("model_type")
    if kind not in list(LAYOUTS):  # it may be no string, and no key
        raise BadInput("config.json: model_type", kind, f"cannot be read; known: {', '.join(sorted(LAYOUTS))}")
    if document.get("quantization_config"):
        raise BadInput("config.json: quantization_config", document["quantization_config"], "cannot be read")
    layout = LAYOUTS[kind]
    theirs = Theirs(document, layout.defaults, layout.aliases)
    if theirs.whole(layout.same["layers"]) > MOST_LAYERS:
        raise theirs.refuse(layout.same["layers"], f"must be at most {MOST_LAYERS}")
    for name, value in layout.theirs.items():
        if theirs.document.get(name, value) != value:
            raise theirs.refuse(name, f"cannot be expressed: must be {value!r}")
    changes = {"compute_dtype": "float32", "blocks": ((layout.mixer, next(iter(layout.channels))),), **layout.built_in}
    model = base().model
    for ours, name in layout.same.items():
        default = flat(model.to_dict())[ours]
        if isinstance(default, bool):
            changes[ours] = theirs.flag(name)
        else:
            changes[ours] = float(theirs.number(name)) if isinstance(default, float) else theirs.whole(name)
    changes |= {} if layout.can_tie else {"tied_embeddings": False}
    changes |= layout.read(theirs)
    config = override(base(), {f"model.{name}": value for name, value in changes.items()}).model
    resolve(config)
    return config.lock()


def read_params(weights: Weights, layout: Layout, spec: Spec) -> Any:
    """Every tensor of the files goes somewhere, and every parameter comes from there."""
    tied = spec.tied_embeddings and any(weights.has(piece.name) for piece in layout.outer if "unembed" in piece.ours)
    found: dict[str, np.ndarray] = {}
    used: set[str] = set()

    def take(piece: Piece, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
        parts = [tensors[name] for name in piece.ours]
        theirs = {name: weights.get(name, shape) for name, shape in piece.shapes(parts).items()}
        used.update(theirs)
        yield from zip(piece.ours, piece.unpack(theirs, parts), strict=True)

    outer = outer_tensors(spec)
    for piece in present(layout.outer, outer):
        found.update(take(piece, outer))
    if tied:  # some files hold the head although it is the embedding
        head = next(piece.name for piece in layout.outer if "unembed" in piece.ours)
        if not np.array_equal(weights.get(head, found["embed"].shape), found["embed"]):
            raise BadInput("config.json: tie_word_embeddings", True, f"but {head} is not the embedding")
        used.add(head)
    for layer, (place, repeat) in enumerate(places(spec)):
        tensors = flat(Block.tensors(spec, spec.blocks[layer]))
        for piece in layout.pieces(spec, spec.blocks[layer], layer):
            for name, array in take(piece, tensors):
                if repeat is None:
                    found[f"{place}.{name}"] = array
                else:
                    shape = (spec.repeats, *array.shape)
                    found.setdefault(f"{place}.{name}", np.empty(shape, np.float32))[repeat] = array
    left = [name for name in weights.names if name not in used and not re.fullmatch(layout.ignored, name)]
    if left:
        remedy = f"is no part of {layout.architecture} with this config.json ({len(left)} such)"
        raise BadInput("tensor", left[0], remedy)
    return jax.tree.map(jnp.asarray, nested(found))


def outer_tensors(spec: Spec) -> dict[str, Tensor]:
    """Those outside the blocks, by dotted name."""
    tree = LanguageModel.tensors(spec)
    return flat({name: part for name, part in tree.items() if name not in ("prefix", "period", "suffix")})


def places(spec: Spec) -> list[tuple[str, int | None]]:
    """Where in the tree each layer lies, and at which of the period's repeats."""
    prefix = [(f"prefix.{i}", None) for i in range(len(spec.prefix))]
    period = [(f"period.{i}", repeat) for repeat in range(spec.repeats) for i in range(len(spec.period))]
    return [*prefix, *period, *((f"suffix.{i}", None) for i in range(len(spec.suffix)))]


# ------------------------------------------------------------------------------------------------ writing


def to_hf(
    config: Config,
    params: Any,
    folder: str | pathlib.Path,
    *,
    fields: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Writes a model section and its parameters so that `transformers` reads them, in float32: whole or not at all.

    The class is the one that has the model's features; raises `BadInput` where none does. `fields` are more for
    config.json (such as `bos_token_id`, `max_position_embeddings`), `files` more files by name (such as
    tokenizer.json). Above `shard_bytes` the weights are cut into several files and an index.
    """
    spec = resolve(config)
    if spec.base is not None and not spec.at_base:
        remedy = "cannot be exported beyond its base's shape: no class of transformers has its multipliers"
        raise BadInput("config.model.parametrization", config.parametrization, remedy)
    check_params(config, params)
    ours = Ours(spec)
    layout = choose(ours)
    document = write_config(layout, ours) | dict(fields or {})
    texts = {**(files or {}), "config.json": json.dumps(document, indent=2, allow_nan=False) + "\n"}
    return write_folder(pathlib.Path(folder), texts, write_params(params, layout, spec), shard_bytes, "config.json")


def choose(ours: Ours) -> Layout:
    """The layout of the class that has the model's features, or comes nearest to it and says what it lacks."""
    if (recursions := ours.spec.recursion.count) > 1:
        raise BadInput(
            "config.model.recursion.count", recursions, "cannot be exported: no class of transformers has it"
        )
    mixers = sorted({block.mixer for block in ours.spec.blocks})
    if len(mixers) > 1 or mixers[0] not in ("attention", *OF_MIXER):
        raise BadInput("config.model.blocks", "+".join(mixers), "cannot be exported: no class of transformers has it")
    if mixers[0] in OF_MIXER:
        return OF_MIXER[mixers[0]]
    if any(block.channel == "moe" for block in ours.spec.blocks):
        return experts.QWEN3_MOE if ours["attention.qk_norm"] else experts.MIXTRAL
    if ours["norm"] != "rmsnorm":
        return decoders.GPT2
    if ours["placement"] == "out":
        return decoders.OLMO2
    if ours["attention.qk_norm"]:
        return decoders.QWEN3
    if ours["attention.qkv_bias"]:
        return decoders.QWEN2
    windows = [block.mixer_options.window for block in ours.spec.blocks]
    return decoders.MISTRAL if any(windows) else decoders.LLAMA


def write_config(layout: Layout, ours: Ours) -> dict[str, Any]:
    """Model section -> config.json."""
    channels = {block.channel for block in ours.spec.blocks}
    if not channels <= layout.channels.keys():
        shown, wanted = "+".join(sorted(channels)), " or ".join(layout.channels)
        remedy = f"cannot be exported: the channel mixer of every layer of {layout.architecture} is {wanted}"
        raise BadInput("config.model.blocks", shown, remedy)
    for name, value in layout.built_in.items():
        if name in ours and ours[name] != value:
            raise ours.refuse(name, f"cannot be exported: {layout.architecture} has {value!r}")
    document = {theirs: ours[name] for name, theirs in layout.same.items()}
    if not layout.can_tie:
        document["tie_word_embeddings"] = False
    return {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "dtype": "float32",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **document,
        **layout.theirs,
        **layout.write(ours),
    }


def check_params(config: Config, params: Any) -> None:
    """Raises `BadInput` unless the parameters are those of the model section."""
    want = {name: a.shape for name, a in flat(models.abstract(config)[1]).items()}
    got = {name: np.shape(a) for name, a in flat(params).items()}
    for name in sorted({*want, *got}):
        if want.get(name) != got.get(name):
            raise BadInput(f"params.{name}", got.get(name), f"the model section has {want.get(name)}")


def fold(arrays: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """muP's multipliers, which no class has, become part of the embedding and of the final norm. A tied head has that
    of the embedding then, which the norm takes back."""
    inward, outward = spec.embed_multiplier, spec.logits_multiplier
    norm = outward / inward if spec.tied_embeddings else outward
    factors = {"embed": inward, "positions": inward, "final_norm.scale": norm, "final_norm.bias": norm}
    return {name: scaled(a, factors.get(name, 1.0)) for name, a in arrays.items()}


def write_params(params: Any, layout: Layout, spec: Spec) -> list[Entry]:
    """Their tensors, made one entry at a time as they are written."""
    arrays = fold(flat(params), spec)

    def entry(piece: Piece, tensors: Mapping[str, Tensor], place: str = "", repeat: int | None = None) -> Entry:
        parts = [tensors[name] for name in piece.ours]

        def make() -> dict[str, np.ndarray]:
            ours = [arrays[place + name] if repeat is None else arrays[place + name][repeat] for name in piece.ours]
            return piece.pack([np.asarray(a, np.float32) for a in ours], parts)

        return piece.shapes(parts), make

    outer = outer_tensors(spec)
    entries = [entry(piece, outer) for piece in present(layout.outer, outer)]
    if spec.tied_embeddings and not layout.can_tie:
        head = next(piece for piece in layout.outer if "unembed" in piece.ours)
        shape = outer["embed"].shape
        entries.append(({head.name: shape}, lambda: {head.name: np.asarray(arrays["embed"], np.float32)}))
    for layer, (place, repeat) in enumerate(places(spec)):
        tensors = flat(Block.tensors(spec, spec.blocks[layer]))
        entries += [
            entry(piece, tensors, f"{place}.", repeat) for piece in layout.pieces(spec, spec.blocks[layer], layer)
        ]
    return entries
