"""How a class of `transformers` corresponds to a model of ours: fields of config.json, tensors by name and form."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scalelab.errors import BadInput
from scalelab.models.block import Block
from scalelab.models.spec import BlockSpec, Spec
from scalelab.parametrization import Tensor

# ------------------------------------------------------------------------------------------------ tensors


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of their tensors: some of ours, side by side along their outputs.

    Forms, with ours as matrices (in, out): `matrix` is torch's (out, in); `columns` (in, out) (GPT-2's Conv1D);
    `vector` flat; `table` as it is; `taps` ours (K, C), theirs (C, 1, K); `experts` one `matrix` for each entry of our
    first axis, its number in place of {} in the name.
    """

    name: str
    ours: tuple[str, ...]
    form: str = "matrix"

    def pack(self, arrays: Sequence[np.ndarray], tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Ours -> theirs by name."""
        if self.form == "experts":
            return {self.name.format(e): expert.T for e, expert in enumerate(arrays[0])}
        if self.form == "table":
            return {self.name: arrays[0]}
        if self.form == "taps":
            return {self.name: arrays[0].T[:, None, :]}
        if self.form == "vector":
            return {self.name: np.concatenate([a.reshape(-1) for a in arrays])}
        columns = np.concatenate([a.reshape(t.fan_in, -1) for a, t in zip(arrays, tensors, strict=True)], axis=1)
        return {self.name: columns if self.form == "columns" else columns.T}

    def unpack(self, theirs: Mapping[str, np.ndarray], tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """The inverse of `pack`."""
        if self.form == "experts":
            return [np.stack([theirs[self.name.format(e)].T for e in range(tensors[0].shape[0])])]
        array = theirs[self.name]
        if self.form == "table":
            return [array]
        if self.form == "taps":
            return [array[:, 0, :].T]
        if self.form == "matrix":
            array = array.T
        outs = [t.size if self.form == "vector" else t.size // t.fan_in for t in tensors]
        parts = np.split(array, list(itertools.accumulate(outs))[:-1], axis=-1)
        return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def shapes(self, tensors: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        """Of theirs, by name."""
        first = tensors[0].shape
        if self.form == "experts":
            return {self.name.format(e): (first[2], first[1]) for e in range(first[0])}
        if self.form == "table":
            return {self.name: first}
        if self.form == "taps":
            return {self.name: (first[1], 1, first[0])}
        if self.form == "vector":
            return {self.name: (sum(t.size for t in tensors),)}
        ins, outs = tensors[0].fan_in, sum(t.size // t.fan_in for t in tensors)
        return {self.name: (ins, outs) if self.form == "columns" else (outs, ins)}


def matrix(name: str, *ours: str) -> Piece:
    return Piece(name, ours)


def vector(name: str, *ours: str) -> Piece:
    return Piece(name, ours, "vector")


def table(name: str, ours: str) -> Piece:
    return Piece(name, (ours,), "table")


def present(pieces: Sequence[Piece], tensors: Mapping[str, Tensor], prefix: str = "") -> list[Piece]:
    """The pieces that a model with these tensors has, their names behind `prefix`. Every tensor is in one of them."""
    kept = [piece for piece in pieces if piece.ours[0] in tensors]
    covered = [name for piece in kept for name in piece.ours]
    assert sorted(covered) == sorted(tensors), (covered, sorted(tensors))
    return [dataclasses.replace(piece, name=prefix + piece.name) for piece in kept]


# ------------------------------------------------------------------------------------------------ fields


class Theirs:
    """The fields of a config.json."""

    def __init__(self, document: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str]):
        self.document, self.defaults = dict(document), defaults
        for name, other in aliases.items():
            if self.document.get(name) is None and other in document:
                self.document[name] = document[other]

    def __getitem__(self, name: str) -> Any:
        """The field's value; where it is absent or null, the default that its class has."""
        value = self.document.get(name)
        if value is None:
            if name not in self.defaults:
                raise BadInput(f"config.json: {name}", None, "is missing")
            value = self.defaults[name]
        return value

    def number(self, name: str) -> int | float:
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise BadInput(f"config.json: {name}", value, "must be a number")
        return value

    def whole(self, name: str) -> int:
        value = self.number(name)
        if value != int(value) or value < 0:
            raise BadInput(f"config.json: {name}", value, "must be a whole number")
        return int(value)

    def whole_or(self, name: str, other: int) -> int:
        """Of a field where null says something else than the default of its class."""
        return other if self.document.get(name) is None else self.whole(name)

    def flag(self, name: str) -> bool:
        if not isinstance(self[name], bool):
            raise self.refuse(name, "must be true or false")
        return self[name]

    def refuse(self, name: str, remedy: str) -> BadInput:
        return BadInput(f"config.json: {name}", self.document.get(name), remedy)


MIXED = object()  # an option that differs from layer to layer


class Ours:
    """The fields of a model section, by dotted name; options are those of the blocks that have them."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.fields: dict[str, Any] = {
            **{f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)},
            "layers": len(spec.blocks),
            "parscale.streams": spec.streams,
        }
        for block in spec.blocks:
            for part, options in ((block.mixer, block.mixer_options), (block.channel, block.channel_options)):
                for f in dataclasses.fields(options) if options is not None else ():
                    name, value = f"{part}.{f.name}", getattr(options, f.name)
                    self.fields[name] = value if self.fields.get(name, value) == value else MIXED

    def __getitem__(self, name: str) -> Any:
        value = self.fields[name]
        if value is MIXED:
            raise self.refuse(name, "is not the same in all layers, which cannot be exported", "(varies)")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def refuse(self, name: str, remedy: str, value: Any = None) -> BadInput:
        return BadInput(f"config.model.{name}", self.fields.get(name) if value is None else value, remedy)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A class of `transformers`. Fields of ours are dotted names below `model`, fields of theirs those of config.json.

    What `same`, `built_in` and `theirs` do not say, `read` and `write` do.
    """

    model_type: str
    architecture: str
    base: str  # what the names of all tensors but the head's begin with
    layer: str  # what those of layer {} begin with
    mixer: str
    channels: Mapping[str, tuple[Piece, ...]]  # the channel mixers that its layers may have, and their tensors
    outer: tuple[Piece, ...]
    block: tuple[Piece, ...]  # the other tensors of a layer
    same: Mapping[str, str]  # our field -> theirs, of the same value
    built_in: Mapping[str, Any]  # our fields that a model of the class has at this value
    theirs: Mapping[str, Any]  # their fields that must have this value
    defaults: Mapping[str, Any]  # of their fields that may be absent
    read: Callable[[Theirs], dict[str, Any]] = lambda theirs: {}
    write: Callable[[Ours], dict[str, Any]] = lambda ours: {}
    ignored: str = r"(?!)"  # their buffers, which hold nothing learned
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other names of their fields, in older files
    can_tie: bool = True  # or else the head is written out

    def pieces(self, spec: Spec, block: BlockSpec, layer: int) -> list[Piece]:
        return present(
            self.block + self.channels[block.channel], flat(Block.tensors(spec, block)), self.layer.format(layer)
        )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names -> nested dict."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def stack(entries: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """The layers' entries as prefix, blocks and suffix, with the fewest blocks written out: what repeats is scanned."""
    n = len(entries)
    best = (n + 1, 0, n, 1)
    for prefix, period in itertools.product(range(n), range(1, n + 1)):
        if prefix + period >= best[0]:
            continue
        repeats = 1
        while entries[prefix + repeats * period :][:period] == entries[prefix:][:period]:
            repeats += 1
        written = prefix + period + n - prefix - repeats * period
        best = min(best, (written, prefix, period, repeats))
    _, prefix, period, repeats = best
    end = prefix + period * repeats
    parts = {"prefix": entries[:prefix], "blocks": entries[prefix : prefix + period], "suffix": entries[end:]}
    return {name: tuple(part) for name, part in parts.items()}
