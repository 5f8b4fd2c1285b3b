import pytest

from scalelab import flops, models, recipe
from scalelab.config import base, override
from scalelab.errors import BadInput


@pytest.mark.parametrize("params", [5e3, 3e4, 1e5, 1e6, 2e7, 1e8, 1e9, 1e10])
def test_the_shape_is_valid_near_the_target_and_counted_right(params):
    shape = recipe.transformer(params)
    conf = override(base(), shape | {"model.vocab_size": 257}).model
    models.validate(conf)
    counted = flops.counts(conf).non_embedding
    assert counted == recipe.transformer_params(shape)
    assert counted / params == pytest.approx(1, abs=0.35)


def test_bigger_targets_never_give_smaller_models_nor_higher_rates():
    shapes = [recipe.transformer(10**k) for k in range(4, 11)]
    sizes = [recipe.transformer_params(shape) for shape in shapes]
    assert sizes == sorted(sizes)
    rates = [shape["optim.lr"] for shape in shapes]
    assert rates == sorted(rates, reverse=True)


def test_too_small_a_target_is_refused():
    with pytest.raises(BadInput, match="smallest Transformer"):
        recipe.transformer(100)
