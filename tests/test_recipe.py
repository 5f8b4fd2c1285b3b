import math

import pytest

from scalelab import flops, recipe, sweep
from scalelab.config import base, load, override
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
def test_a_budget_is_six_times_parameters_and_tokens(family):
    N = recipe.params(family, recipe.for_budget(family, 1.2e17, ratio=20)["model.width"])
    assert abs(math.log(6 * N * 20 * N / 1.2e17)) < 0.5  # N = 3.2e7, to a width's step
    assert recipe.for_budget(family, 1.2e17) == recipe.sized(family, 1e17**0.5 / 10)


def test_what_is_no_budget_is_refused():
    with pytest.raises(BadInput, match="budget = 0"):
        recipe.for_budget("mamba", 0)
    with pytest.raises(BadInput, match=r"^argument ratio = -1: must be above 0"):
        recipe.for_budget("mamba", 1e9, -1)
    with pytest.raises(BadInput, match=r"params = .*the smallest mamba"):
        recipe.for_budget("mamba", 1e5)


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


@pytest.mark.parametrize("mixer", ["mlstm_up", "slstm"])
def test_the_papers_xlstm_has_as_many_parameters_as_that_of_the_large_models(mixer):
    for width in (64, 128, 256, 512):
        ratio = recipe.params("xlstm", width, mixer=mixer) / recipe.params("xlstm", width)
        assert 0.95 < ratio < 1.25
    conf = load(f"xlstm:mixer={mixer},size=xs")
    assert conf.family == mixer
    assert conf.model.blocks[0][0] == mixer
    with pytest.raises(BadInput, match="must be one of xs, s, m, l"):
        load(f"xlstm:mixer={mixer},size=7b")


def test_learning_rates_fall_with_the_width():
    rates = [recipe.learning_rate(width) for width in recipe.WIDTHS]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.02


@pytest.mark.parametrize("mixer", [name for name in recipe.FAMILIES if name not in ("hybrid", "mor")])
def test_a_hybrid_of_every_mixer_that_is_offered(mixer):
    assert load(f"hybrid:mixer={mixer},window=8,size=xs").family == f"{mixer}_hybrid"
    with pytest.raises(BadInput, match=rf"^argument mixer = 'nope': must be one of .*\b{mixer}\b"):
        recipe.shape("hybrid", 64, mixer="nope")


@pytest.mark.parametrize("mixer", ["hybrid", "mor"])
def test_what_cannot_be_a_hybrid_is_not_offered(mixer):
    with pytest.raises(BadInput, match=rf"^argument mixer = '{mixer}': must be one of (?!.*\b{mixer}\b)"):
        recipe.shape("hybrid", 64, mixer=mixer)


@each
@pytest.mark.parametrize("width", [-8, 0, 7, 100])
def test_a_width_is_a_multiple_of_8(family, width):
    with pytest.raises(BadInput, match=f"^width = {width}: must be a multiple of 8, at least 8$"):
        recipe.shape(family, width)


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_a_size_is_a_number(target):
    with pytest.raises(BadInput, match=f"^argument params = {target}: must be finite and above 0"):
        recipe.sized("transformer", target)


def test_what_is_too_small_is_refused():
    with pytest.raises(BadInput, match="smallest transformer"):
        recipe.sized("transformer", 100)
    with pytest.raises(BadInput, match="must be one of"):
        recipe.sized("perceptron", 1e6)


def test_an_isoflop_sweep_of_families_gives_each_its_own_config_at_equal_compute():
    alone = sweep.expand("isoflop:budgets=3e12,sizes=3,span=2", {})
    both = sweep.expand("isoflop:families=transformer:moe:hybrid,budgets=3e12,sizes=3,span=2", {})
    by_family = {}
    for run in both.runs:
        by_family.setdefault(run.spec.config.family, []).append(run)
    assert list(by_family) == ["transformer", "moe", "hybrid"]
    assert [run.spec.id for run in by_family["transformer"]] == [run.spec.id for run in alone.runs]
    for family, runs in by_family.items():
        assert [run.flops for run in runs] == pytest.approx([3e12] * 3, rel=0.01)
        for run in runs:
            model = run.spec.config.model
            want = override(base(), recipe.shape(family, model.width)).model
            assert {**model.to_dict(), "compute_dtype": ""} == {**want.to_dict(), "compute_dtype": ""}
            assert run.spec.config.data_seed == 0
    with pytest.raises(BadInput, match="family = 'mambo': must be one of transformer"):
        sweep.expand("isoflop:families=mambo", {})
