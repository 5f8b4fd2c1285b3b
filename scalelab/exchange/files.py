"""The files on both sides: safetensors and JSON, read with care and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scalelab import models
from scalelab.config import base, override
from scalelab.config import flatten as flatten_config
from scalelab.errors import BadInput
from scalelab.exchange.layout import flat, nested
from scalelab.paths import write_atomically
from scalelab.schema import Config

INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
SCHEMA = 1
# (shapes by name, what makes the arrays)
Entry = tuple[Mapping[str, tuple[int, ...]], Callable[[], Mapping[str, np.ndarray]]]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput("path", str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, a number too long, brackets too deep
        raise BadInput("path", str(path), f"is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise BadInput("path", str(path), "must hold a JSON object")
    return document


class Weights:
    """The tensors of a folder, by name. Names that lack `base`, as those of a model without its head do, get it."""

    def __init__(self, folder: pathlib.Path, base: str = ""):
        self._open, files = contextlib.ExitStack(), {}
        if (folder / INDEX).is_file():
            shards = read_json(folder / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(file, str) and pathlib.Path(file).name == file for file in shards.values()
            ):
                raise BadInput("path", str(folder / INDEX), "has no weight_map of tensors to files beside it")
        elif (folder / "model.safetensors").is_file():
            shards = None
        else:
            raise BadInput("path", str(folder), "has no model.safetensors (other formats are not read)")
        for file in sorted(set(shards.values())) if shards else ["model.safetensors"]:
            try:
                files[file] = self._open.enter_context(safe_open(folder / file, "np"))
            except (OSError, SafetensorError) as error:
                self._open.close()
                raise BadInput("path", str(folder / file), f"is not a safetensors file ({error})") from None
        held = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118
        if missing := sorted(name for name in shards or () if name not in held):
            self._open.close()
            raise BadInput("tensor", missing[0], f"is in {INDEX} and not in its file")
        bare = base and not any(name.startswith(base) for name in held)
        self._held = {
            (base + name if bare and name != "lm_head.weight" else name): (name, files[file], folder / file)
            for name, file in held.items()
        }

    @property
    def names(self) -> list[str]:
        return sorted(self._held)

    def has(self, name: str) -> bool:
        return name in self._held

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """In float32. Raises `BadInput` where it is absent, of another shape, or no floating-point number."""
        if name not in self._held:
            raise BadInput("tensor", name, "is missing")
        stored, file, path = self._held[name]
        piece = file.get_slice(stored)
        if tuple(piece.get_shape()) != shape:
            raise BadInput("tensor", name, f"has shape {tuple(piece.get_shape())}, config.json says {shape}")
        if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise BadInput("tensor", name, f"of type {piece.get_dtype()} cannot be read")
        try:
            return file.get_tensor(stored).astype(np.float32)
        except SafetensorError as error:
            raise BadInput("path", str(path), f"is damaged ({error})") from None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


# ------------------------------------------------------------------------------------------------ writing


def write_folder(
    folder: pathlib.Path, texts: Mapping[str, str], entries: Sequence[Entry], shard_bytes: int, key: str
) -> pathlib.Path:
    """Weights and text files, one of which is the `key`, without which nothing reads the folder. A folder that is not
    there yet, or empty, appears whole; in one that has files the old key goes first, then the old weights and
    tokenizer, and the new key comes last."""
    for other in {"config.json", "model.json"} - {key}:
        if (folder / other).exists():
            raise BadInput("folder", str(folder), f"holds a model in another layout ({other}); name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = pathlib.Path(temporary) / "new"
            new.mkdir()
            save_weights(new, entries, shard_bytes)
            for name, text in texts.items():
                write_atomically(new / name, text)
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                new.replace(folder)
                return folder
            (folder / key).unlink(missing_ok=True)
            for old in (*folder.glob("model*.safetensors"), folder / INDEX, folder / TOKENIZER):
                old.unlink(missing_ok=True)
            for path in sorted(new.iterdir(), key=lambda path: path.name == key):
                path.replace(folder / path.name)
    except OSError as error:
        raise BadInput("folder", str(folder), f"cannot be written: {error.strerror}") from None
    return folder


def save_weights(folder: pathlib.Path, entries: Sequence[Entry], shard_bytes: int) -> None:
    """model.safetensors, or shards of at most `shard_bytes` (or one entry) and their index."""
    shards: list[list[Entry]] = []
    free = 0
    for shapes, make in entries:
        size = sum(4 * math.prod(shape) for shape in shapes.values())
        if not shards or size > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append((shapes, make))
        free -= size
    where, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        arrays: dict[str, np.ndarray] = {}
        for shapes, make in shard:
            made = make()
            assert {name: a.shape for name, a in made.items()} == dict(shapes), shapes
            arrays |= {name: np.ascontiguousarray(a, np.float32) for name, a in made.items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        os.umask(mask := os.umask(0))
        (folder / file).chmod(0o666 & ~mask)  # as of any other file; safetensors makes it its owner's alone
        where |= dict.fromkeys(arrays, file)
        total += sum(a.nbytes for a in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ our own


def save(
    config: Config, params: Any, folder: str | pathlib.Path, files: Mapping[str, str] | None = None
) -> pathlib.Path:
    """A model outside a run: model.json (its section of a config) and model.safetensors, names as in the tree."""
    document = {"schema": SCHEMA, "model": config.to_dict()}
    texts = {**(files or {}), "model.json": json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"}
    arrays = {name: np.asarray(a, np.float32) for name, a in flat(params).items()}
    entries: list[Entry] = [({name: a.shape}, lambda name=name: {name: arrays[name]}) for name, a in arrays.items()]
    return write_folder(pathlib.Path(folder), texts, entries, 2**62, "model.json")


def load(folder: str | pathlib.Path) -> tuple[Config, Any]:
    """What `save` wrote: (model section, parameters)."""
    folder = pathlib.Path(folder)
    document = read_json(folder / "model.json")
    if not isinstance(document.get("model"), dict) or document.get("schema") != SCHEMA:
        raise BadInput("path", str(folder / "model.json"), f"is not a model of schema {SCHEMA}")
    changes = {f"model.{name}": value for name, value in flatten_config(document["model"]).items()}
    config = override(base(), changes).model.lock()
    shapes = {name: a.shape for name, a in flat(models.abstract(config)[1]).items()}
    with Weights(folder) as weights:
        found = {name: weights.get(name, shape) for name, shape in shapes.items()}
    return config, jax.tree.map(jnp.asarray, nested(found))
