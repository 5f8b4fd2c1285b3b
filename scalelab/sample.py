"""Writes text from a finished or unfinished run, token by token."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from scalelab import data, models
from scalelab.checkpoint import load_params
from scalelab.config import RunSpec
from scalelab.errors import BadInput
from scalelab.track import say
from scalelab.train import resolve


def text(
    folder: pathlib.Path, prompt: str = "", tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> Iterator[str]:
    """The prompt, then what the run continues it with, in pieces; ends at the end of a document."""
    if temperature < 0:
        raise BadInput("--temperature", temperature, "must be at least 0")
    if tokens < 1:
        raise BadInput("--tokens", tokens, "must be at least 1")
    try:
        spec = RunSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"), str(folder / "spec.json"))
    except OSError:
        raise BadInput("run", str(folder), "is no run's folder (it has no spec.json)") from None
    corpus = data.open(spec.config.data)
    model_config = resolve(spec.config, corpus)
    graphdef, shapes = models.abstract(model_config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    found = load_params(folder, shapes, say)
    if found is None:
        raise BadInput("run", str(folder), "has no weights (not trained yet, or checkpoint.final = nothing)")
    params = found[1]

    context = [corpus.bos, *corpus.tokenizer.encode(prompt)]
    state = models.merge(graphdef, params).init_state(1, len(context) + tokens)

    @jax.jit
    def step(params, state, token, key):
        logits, state = models.merge(graphdef, params).step(token, state)
        logits = logits[0, : corpus.vocab_size]  # padding of the vocabulary is never written
        drawn = jax.random.categorical(key, logits / max(temperature, 1e-6))
        return state, jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)[None]

    yield prompt
    token = None
    for known in context:
        state, token = step(params, state, jnp.full((1,), known, jnp.int32), jax.random.key(seed))
    written: list[int] = []
    shown = ""
    for key in jax.random.split(jax.random.key(seed), tokens):
        value = int(token[0])
        if value == corpus.bos:
            break
        written.append(value)
        # A character may need several tokens: what is not a whole one yet waits.
        now = corpus.tokenizer.decode(written)
        if not now.endswith("\ufffd"):
            yield now[len(shown) :]
            shown = now
        state, token = step(params, state, token, key)
