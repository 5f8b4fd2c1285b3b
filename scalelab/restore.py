"""Opens a trained run again: its spec, its tokenizer, its model and the parameters of its newest checkpoint."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax

from scalelab import data, models, records
from scalelab.checkpoint import load_params
from scalelab.config import RunSpec
from scalelab.data.tokenizers import Tokenizer
from scalelab.errors import BadInput
from scalelab.schema import Config
from scalelab.track import say


class Opened(NamedTuple):
    spec: RunSpec
    tokenizer: Tokenizer
    model: Config  # the model section, vocabulary known
    params: Any


def read_spec(folder: pathlib.Path) -> RunSpec:
    if not (folder / "spec.json").is_file():
        raise BadInput("run", str(folder), "is no run's folder (it has no spec.json)")
    return RunSpec.load(folder / "spec.json")


def load(folder: pathlib.Path) -> Opened:
    """A finished or unfinished run. Its data need not be there any more, but its tokenizer must, and be the same.

    Raises `BadInput` for what is no run, has no weights, or whose tokenizer has changed.
    """
    spec = read_spec(folder)
    tokenizer = data.open_tokenizer(spec.config.data)
    record = records.read(folder)
    if record is not None:
        trained = record.data["tokenizer"]
        if tokenizer.fingerprint != trained:
            remedy = f"is not the tokenizer that {folder.name} was trained with ({_short(trained)})"
            raise BadInput("config.data.tokenizer", _short(tokenizer.fingerprint), remedy)
    elif not data.fingerprint(spec.config.data).items() <= spec.content.items():
        raise BadInput("run", str(folder), "is unfinished, and its data or tokenizer have changed since it was planned")
    model = models.with_vocabulary(spec.config.model, tokenizer.vocab_size)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = models.abstract(model)[1]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    damaged: list[str] = []
    found = load_params(folder, shapes, damaged.append)
    for message in damaged:
        say(message)
    if found is None:
        remedy = "no checkpoint is sound" if damaged else "not trained yet, or checkpoint.final = nothing"
        raise BadInput("run", str(folder), f"has no weights ({remedy})")
    return Opened(spec, tokenizer, model, found[1])


def check_tokenizer(run: Opened, found: Tokenizer, field: str, reference: str) -> None:
    """Raises `BadInput` unless the tokens of some data are the run's."""
    if found.fingerprint != run.tokenizer.fingerprint:
        remedy = f"its tokenizer ({_short(found.fingerprint)}) is not the run's ({_short(run.tokenizer.fingerprint)})"
        raise BadInput(field, reference, remedy)


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) < 20 else fingerprint[:12]
