"""Writes text from a finished or unfinished run, token by token."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from scalelab import models
from scalelab.errors import BadInput
from scalelab.restore import load


def text(
    folder: pathlib.Path, prompt: str = "", tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> Iterator[str]:
    """The prompt, then what the run continues it with, in pieces; ends at the end of a document."""
    if not 0 <= temperature < math.inf:
        raise BadInput("--temperature", temperature, "must be at least 0 and finite")
    if not 0 <= seed < 2**32:
        raise BadInput("--seed", seed, "must lie in [0, 2^32)")
    if tokens < 1:
        raise BadInput("--tokens", tokens, "must be at least 1")
    _, tokenizer, config, params = load(folder)
    graphdef, _ = models.abstract(config)
    try:
        context = [tokenizer.bos, *tokenizer.encode(prompt)]
    except (ValueError, TypeError):  # not UTF-8, or not of the alphabet
        raise BadInput("--prompt", prompt, "holds characters that the run's tokenizer cannot encode") from None

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        logits = logits[..., : tokenizer.vocab_size]  # padding of the vocabulary is never written
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, logits / temperature)

    @jax.jit
    def read(params, context, key):
        model = models.merge(graphdef, params)
        logits, state = model.extend(context, model.init_state(1, context.shape[1] + tokens))
        return choose(logits[:, -1], key), state

    @jax.jit
    def step(params, state, token, key):
        logits, state = models.merge(graphdef, params).step(token, state)
        return choose(logits, key), state

    yield prompt
    keys = jax.random.split(jax.random.key(seed), tokens)
    token, state = read(params, jnp.asarray([context], jnp.int32), keys[0])
    written: list[int] = []
    shown = ""
    for key in keys[1:]:
        if int(token[0]) == tokenizer.bos:
            break
        written.append(int(token[0]))
        # A character may need several tokens: what is not a whole one yet waits.
        now = tokenizer.decode(written)
        if not now.endswith("\ufffd"):
            yield now[len(shown) :]
            shown = now
        token, state = step(params, state, token, key)
    if int(token[0]) != tokenizer.bos:
        yield tokenizer.decode([*written, int(token[0])])[len(shown) :]
