"""What is particular to linear mixers: slopes by depth, unit keys, signs that DeltaNet can flip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import section

from scalelab import models
from scalelab.errors import BadInput
from scalelab.models.delta import unit
from scalelab.models.linear_attention import alibi


def slopes(layers, heads, **changes):
    config = section(layers=layers, lightning__heads=heads, **changes)
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    return np.asarray(params["period"]["0"]["mixer"]["slopes"])


def test_slopes_are_those_of_the_layer_in_the_whole_stack():
    got = slopes(3, 2, blocks=(("lightning", "mlp"),))
    base = np.array([2**-4, 2**-8])
    np.testing.assert_allclose(got, [base * (share + 1e-5) for share in (1, 0.5, 0)], rtol=1e-6)
    hybrid = slopes(4, 2, blocks=(("lightning", "mlp"), ("attention", "mlp")))  # layers 0 and 2 of 4
    np.testing.assert_allclose(hybrid, [base * (1 + 1e-5), base * (1 / 3 + 1e-5)], rtol=1e-6)
    assert np.isfinite(slopes(1, 2, blocks=(("lightning", "mlp"),))).all()


def test_slopes_of_any_number_of_heads():
    assert alibi(8) == [2.0**-h for h in range(1, 9)]
    assert alibi(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    assert len(set(alibi(12))) == 12


def test_unit_vectors():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e-6, 4e-6]])
    np.testing.assert_allclose(unit(x, 0.5), [[0.3, 0.4], [0, 0], [0.0015, 0.002]], rtol=1e-4)
    assert jnp.isfinite(jax.grad(lambda x: unit(x, 1.0).sum())(x)).all()


@pytest.mark.parametrize("negative", [False, True])
def test_only_negative_eigenvalues_flip_a_state(negative):
    """With its gate wide open and one key, a token takes a stored value to its negative or erases it."""
    config = section(width=4, layers=1, blocks=(("deltanet", "none"),), deltanet__heads=1, deltanet__negative=negative)
    graphdef, params = models.split(models.build(config, __import__("flax").nnx.Rngs(0)))
    mixer = params["period"]["0"]["mixer"]
    key = jnp.array([1.0, 0, 0, 0])
    qkv = jnp.zeros((4, 12)).at[0, 4].set(1e3)  # k = (1, 0, 0, 0), v = 0 for x = (1, 0, 0, 0)
    mixer |= {"qkv": qkv[None], "beta": jnp.zeros((1, 4, 1)).at[0, 0].set(50.0), "conv": jnp.ones((1, 4, 12))}
    model = models.merge(graphdef, params)
    part = jax.tree.map(lambda a: a[0], model.period["0"].mixer)
    state = part.init_state(1, 1) | {"S": jnp.ones((1, 1, 4, 4))}
    _, after = part.step(key[None], state)
    np.testing.assert_allclose(after["S"][0, 0, 0], -1.0 if negative else 0.0, atol=1e-5)
    np.testing.assert_allclose(after["S"][0, 0, 1:], 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (("gla", "mlp"),), "gla__heads": 3}, "model.gla.heads.*half of the width"),
        ({"blocks": (("gla", "mlp"),), "gla__chunk": 48}, "model.gla.chunk.*power of two"),
        ({"blocks": (("deltanet", "mlp"),), "deltanet__heads": 5}, "model.deltanet.heads.*divide the width"),
        (
            {"blocks": (("gated_deltanet", "mlp"),), "gated_deltanet__value_heads": 6},
            "model.gated_deltanet.value_heads.*multiple of heads",
        ),
        ({"blocks": (("lightning", "mlp"),), "lightning__head_dim": 0}, "model.lightning.head_dim.*at least 1"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(BadInput, match=message):
        models.validate(section(**changes))
