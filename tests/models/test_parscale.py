"""ParScale beyond what every family owes."""

import jax
import jax.numpy as jnp
import numpy as np
from family import section

from scalelab import models


def built(**changes):
    config = section(parscale__prefix=3, **changes)
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    return config, params


def logits(config, params):
    text = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 9)), jnp.int32)
    return jax.jit(lambda p: models.logits(config, p, text))(params)


def test_one_stream_is_the_plain_model_bit_for_bit():
    config, params = built(parscale__streams=1)
    plain = section()
    assert jax.tree.structure(models.roles(config)) == jax.tree.structure(models.roles(plain))
    again = jax.jit(lambda key: models.init(plain, key))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    np.testing.assert_array_equal(logits(config, params), logits(plain, params))


def test_weights_sum_to_one_and_none_is_below_its_share_of_the_smoothing():
    config, params = built(parscale__streams=4, parscale__smoothing=0.2)
    model = models.merge(models.abstract(config)[0], params)
    x = 50 * jax.random.normal(jax.random.key(1), (3, 5, 4, 16))
    w = model.aggregator.weights(x)
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-6)
    assert float(w.min()) >= 0.2 / 4 - 1e-7


def test_identical_prefixes_make_the_mixture_irrelevant():
    config, params = built(parscale__streams=2)
    mixer = params["period"]["0"]["mixer"]
    for name in ("prefix_k", "prefix_v"):
        mixer[name] = jnp.broadcast_to(mixer[name][:, :1], mixer[name].shape)
    before = logits(config, params)
    params["aggregator"] = jax.tree.map(lambda a: a + 1.0, params["aggregator"])
    np.testing.assert_allclose(logits(config, params), before, rtol=1e-5, atol=1e-5)


def test_permuting_the_streams_with_the_aggregator_changes_nothing():
    config, params = built(parscale__streams=3)
    before, order = logits(config, params), jnp.array([2, 0, 1])
    mixer, mix = params["period"]["0"]["mixer"], params["aggregator"]
    for name in ("prefix_k", "prefix_v"):
        mixer[name] = mixer[name][:, order]
    mix["inward"], mix["out"], mix["out_bias"] = mix["inward"][order], mix["out"][:, order], mix["out_bias"][order]
    np.testing.assert_allclose(logits(config, params), before, rtol=1e-5, atol=1e-5)


def test_streams_differ_by_their_prefixes():
    config, params = built(parscale__streams=2)
    mixer = params["period"]["0"]["mixer"]
    before = logits(config, params)
    mixer["prefix_v"] = mixer["prefix_v"].at[:, 1].add(1.0)
    assert float(jnp.abs(logits(config, params) - before).max()) > 1e-3
