import math

import pytest

from scalelab import flops, recipe
from scalelab.config import base, override
from scalelab.errors import BadInput

each = pytest.mark.parametrize("family", recipe.FAMILIES)


@each
@pytest.mark.parametrize("target", [3e4, 1e6, 1e8, 1e9])
def test_sizes_come_near_their_target_and_are_what_they_say(family, target):
    shape = recipe.sized(family, target)
    assert abs(math.log(recipe.params(family, shape["model.width"]) / target)) < 0.35
    config = override(base(), {**shape, "model.vocab_size": 100})
    counts = flops.counts(config.model)
    assert counts.active - counts.embedding - counts.unembedding == recipe.params(family, shape["model.width"])
    assert config.family == family
    for width in recipe.WIDTHS[:40]:  # no other width comes nearer
        mine, other = (abs(math.log(recipe.params(family, w) / target)) for w in (shape["model.width"], width))
        assert mine <= other + 1e-12


@each
def test_counts_grow_with_the_width(family):
    counts = [recipe.params(family, width) for width in recipe.WIDTHS[:30]]
    assert counts == sorted(set(counts))


def test_the_transformer_by_hand():
    shape = recipe.shape("transformer", 256)
    width, layers, hidden = 256, shape["model.layers"], shape["model.mlp.hidden"]
    assert (layers, hidden) == (4, 704)
    by_hand = layers * (4 * width**2 + 3 * width * hidden + 2 * 64) + (2 * layers + 1) * width  # QK-norm: 2 d
    assert recipe.params("transformer", 256) == by_hand


def test_learning_rates_fall_with_the_width():
    rates = [recipe.learning_rate(width) for width in recipe.WIDTHS]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.02


def test_what_is_too_small_is_refused():
    with pytest.raises(BadInput, match="smallest transformer"):
        recipe.sized("transformer", 100)
    with pytest.raises(BadInput, match="must be one of"):
        recipe.sized("perceptron", 1e6)
