"""What channel mixers, and the router of recursions, tell and ask of the training step: counters over a batch, losses
that depend on the whole of it, buffers that change after an update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from scalelab.models import recursion
from scalelab.models.registry import CHANNELS, resolve
from scalelab.models.spec import BlockSpec

PARTS = ("prefix", "period", "suffix")


def _channels(config: Any) -> Iterator[tuple[str, str, BlockSpec]]:
    """(part of the stack, name in it, block) of the blocks that have a channel mixer, as the parameters are held."""
    spec = resolve(config)
    for part in PARTS:
        for i, block in enumerate(getattr(spec, part)):
            if block.channel != "none":
                yield part, str(i), block


def _of(tree: Any, part: str, name: str) -> dict[str, Array]:
    return tree.get(part, {}).get(name, {}).get("channel", {})


def counters(aux: dict[str, Any]) -> dict[str, Any]:
    """The aux of `LanguageModel.hidden` without its losses."""
    return {k: counters(v) if isinstance(v, dict) else v for k, v in aux.items() if k != "loss"}


def joint(config: Any) -> bool:
    """Whether the loss on a part of a batch depends on the counters of the whole."""
    return any(CHANNELS[block.channel].joint(block.channel_options) for _, _, block in _channels(config))


def rest_of_loss(config: Any, aux: dict[str, Any], whole: dict[str, Any]) -> Array:
    """What `aux["loss"]` of a part of a batch lacks, given the counters of the whole."""
    rest = jnp.zeros((), jnp.float32)
    for part, name, block in _channels(config):
        channel = CHANNELS[block.channel]
        if channel.joint(block.channel_options):
            rest += channel.rest_of_loss(block.channel_options, _of(aux, part, name), _of(whole, part, name))
    return rest


def after_step(config: Any, params: Any, counted: dict[str, Any]) -> Any:
    """The parameters after an optimiser step on a batch with these counters: buffers move."""
    params = jax.tree.map(lambda a: a, params)  # dicts of its own
    for part, name, block in _channels(config):
        own, seen = params[part][name]["channel"], _of(counted, part, name)
        if part == "period" and config.recursion.count > 1:  # a layer's counters are those of all its recursions
            seen = {
                key: jnp.sum(a.reshape(config.recursion.count, -1, *a.shape[1:]), axis=0) for key, a in seen.items()
            }
        own |= CHANNELS[block.channel].after_step(block.channel_options, own, seen)
    return params


def summary(config: Any, counted: dict[str, Any]) -> dict[str, Any]:
    """What to log of a batch with these counters: {"routing": {name: mean over layers, of "max_..." the largest, and
    what `recursion.summary` says}, "load": (layers, experts), first layer of a pass first}, where there are any."""
    found: dict[str, list[tuple[int, Array]]] = {}
    for part, name, block in _channels(config):
        if seen := _of(counted, part, name):
            for key, values in CHANNELS[block.channel].summary(block.channel_options, seen).items():
                layers = values if part == "period" else values[None]
                entries = found.setdefault(key, [])
                entries += [(block.layer + block.stride * i, layers[i]) for i in range(layers.shape[0])]
    stacked = {key: jnp.stack([v for _, v in sorted(entries, key=lambda e: e[0])]) for key, entries in found.items()}
    load = {"load": stacked.pop("load")} if stacked else {}
    reduced = {key: jnp.max(v) if key.startswith("max") else jnp.mean(v) for key, v in stacked.items()}
    if "recursion" in counted:
        reduced |= recursion.summary(resolve(config).recursion, counted["recursion"])
    return {"routing": reduced, **load} if reduced else {}
