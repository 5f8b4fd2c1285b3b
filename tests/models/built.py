"""Small models, built and compiled once each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from family import V

from scalelab import models


def tokens(B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (B, T)), jnp.int32)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def forms(sections):
    """Of the models of these sections, each by its name: (graph definition, parameters), the full pass, the pass from a
    state on, and the first state."""

    @functools.cache
    def built(name):
        """Parameters are off their start, so that every term counts; buffers as they are."""
        config = sections[name]
        graphdef, _ = models.abstract(config)
        params = jax.jit(lambda key: models.init(config, key))(jax.random.key(7))
        rng = np.random.default_rng(0)

        def stir(a, role):
            return a if role == "buffer" else a + np.float32(0.1 * rng.normal(size=a.shape))

        return graphdef, jax.tree.map(stir, params, models.roles(config))

    @functools.cache
    def full(name):
        graphdef, _ = built(name)
        return jax.jit(lambda p, t, s=None, positions=None: models.merge(graphdef, p)(t, s, positions))

    @functools.cache
    def extend(name):
        graphdef, _ = built(name)
        return jax.jit(lambda p, t, state, s=None: models.merge(graphdef, p).extend(t, state, s))

    def start(name, batch, max_len):
        graphdef, _ = built(name)
        return jax.jit(lambda p: models.merge(graphdef, p).init_state(batch, max_len))(built(name)[1])

    return built, full, extend, start
