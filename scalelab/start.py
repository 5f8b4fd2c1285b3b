"""Where a run starts: at random, or from parameters that are there already (`config.start`).

`start.path` names a run's folder or one that `scalelab import` wrote. The new model has every tensor of the old one, in
the same shape, and may have more of them: those are drawn as usual. `start.train = "new"` trains them alone.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from scalelab import checkpoint, exchange, flops, models
from scalelab.config import canonical_json
from scalelab.data import Corpus
from scalelab.errors import BadInput
from scalelab.schema import Config

CONTENT = "(start)"  # its name beside those of the data's sources, none of which is in brackets


@functools.lru_cache(maxsize=1)
def load(path: str) -> Any:
    """The parameters, in NumPy arrays, of a run's newest checkpoint, or of an imported model. Raises `BadInput`."""
    folder = pathlib.Path(path)
    if (folder / "model.json").is_file():
        return exchange.load(folder)[1]
    found = checkpoint.load_params(folder)
    if found is None:
        remedy = "must be the folder of a run with weights, or one that `scalelab import` wrote"
        raise BadInput("config.start.path", path, remedy)
    return jax.device_get(found[1])  # copies of the host: a step may give its arrays' memory away


@functools.lru_cache(maxsize=1)
def _digest(path: str) -> str:
    return hashlib.sha256(canonical_json(checkpoint.checksums(load(path))).encode()).hexdigest()[:16]


def content(config: Config, corpus: Corpus) -> dict[str, str]:
    """What a run's id knows of its data and of where it starts: hashes of what they hold."""
    return {**corpus.content, CONTENT: _digest(config.start.path)} if config.start.path else dict(corpus.content)


def trained(config: Config, model: Config) -> Any:
    """Which tensors of `model`, the section with its vocabulary known, a run trains: a tree of bool, or None for all.

    Raises `BadInput` where the model doesn't hold the one it starts from, or where nothing in it is new.
    """
    if not config.start.path:
        return None
    old = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(load(config.start.path))}
    shapes = models.abstract(model)[1]
    new = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    for path, shape in old.items():
        if new.get(path) != shape:
            name = ".".join(str(key.key) for key in path)  # type: ignore[union-attr]
            found = f"of shape {new[path]} in config.model" if path in new else "not in config.model"
            raise BadInput("config.start.path", config.start.path, f"its tensor {name} of shape {shape} is {found}")
    if config.start.train == "all":
        return None
    if len(old) == len(new):
        remedy = "config.model has no tensor that the start lacks; set model.parscale.streams, or train all"
        raise BadInput("config.start.train", "new", remedy)
    return jax.tree_util.tree_map_with_path(lambda path, _: path not in old, shapes)


def overlay(params: Any, path: str) -> Any:
    """Fresh parameters, with those of the start in their places."""
    old = dict(jax.tree_util.tree_leaves_with_path(load(path)))
    return jax.tree_util.tree_map_with_path(
        lambda place, new: jax.device_put(old[place], new.sharding) if place in old else new, params
    )


def flops_per_token(config: Config, model: Config) -> float:
    """Of training, in the exact convention; frozen matrices have no gradient."""
    per_token = flops.per_token(model, config.data.seq_len).training
    mask = trained(config, model)
    return per_token if mask is None else per_token - flops.weight_products(model, jax.tree.map(lambda m: not m, mask))


# ------------------------------------------------------------------------------------------ parts of a nested dict


def part(tree: Any, mask: Any) -> Any:
    """The entries of a nested dict where the mask is true; all of it where there is no mask."""
    if mask is None:
        return tree
    found = {name: part(tree[name], m) if isinstance(m, Mapping) else tree[name] for name, m in mask.items() if m}
    return {name: value for name, value in found.items() if not isinstance(value, Mapping) or value}


def put(tree: Any, own: Any) -> Any:
    """The tree with the entries of `own`, a part of it, in their places."""
    if not isinstance(own, Mapping):
        return own
    return {name: put(value, own[name]) if name in own else value for name, value in tree.items()}
