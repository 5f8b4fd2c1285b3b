"""Coordinate checks: what training changes keeps its size under muP and CompleteP, and not under standard."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from scalelab import config, model_plots, models, plots, recipe, sweep
from scalelab.bench import coords
from scalelab.errors import BadInput
from scalelab.parametrization import Rule
from tests.helpers import scalelab

pytestmark = pytest.mark.once
BLOCKS = ("half-way block", "last block")


def slope(found, kind, along, place):
    row = found[(found["parametrization"] == kind) & (found["along"] == along) & (found["place"] == place)]
    return row.iloc[0]


def test_updates_stay_flat_over_widths_and_depths_where_standard_grows():
    table = coords.check("transformer", ("standard", "completep"), (32, 128), (2, 8), 2)
    found = coords.slopes(table)
    for along in ("width", "depth"):
        for place in BLOCKS:
            assert slope(found, "standard", along, place).change_slope > 0.35
            mine = slope(found, "completep", along, place)
            assert abs(mine.change_slope) < 0.15
            assert mine.start_slope < 0.05
    assert abs(slope(found, "completep", "width", "logits").change_slope) < 0.15


def test_outputs_and_head_start_at_an_eighth_and_nothing_else():
    """Also sLSTM's, whose norm's gain is what writes to the stream."""
    for family in ("transformer", "xlstm:mixer=slstm"):
        model = models.with_vocabulary(coords.shape(family, "mup", 64, 2, (64, 2)).model, 257)
        ones = jax.tree.map(jnp.ones_like, models.init(model, jax.random.key(0)))
        ratio = jax.tree.map(lambda a: float(jnp.max(a)), coords.small_outputs(model, ones))
        of_block = ratio["period"]["0"]
        writes = of_block["mixer"].pop("out" if family == "transformer" else "norm"), of_block["channel"].pop("down")
        assert (*writes, ratio.pop("unembed")) == (0.125,) * 3
        assert set(jax.tree.leaves(ratio)) == {1.0}


IN_CI = ("mamba2",)
PAPERS = ("xlstm:mixer=mlstm_up", "xlstm:mixer=slstm")
EACH = [pytest.param(f, marks=() if f in IN_CI else pytest.mark.study) for f in (*recipe.FAMILIES, *PAPERS)]


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
def test_updates_of_every_family_stay_flat_over_widths_and_depths(family):
    least = 4 if family == "hybrid" else 2
    table = coords.check(family, ("standard", "completep"), (64, 256), (least, 8, 32), 3)
    found = coords.slopes(table)
    for along in ("width", "depth"):
        for place in (*BLOCKS, "logits"):
            standard, mine = (slope(found, kind, along, place) for kind in ("standard", "completep"))
            assert abs(mine.change_slope) < 0.2  # of one seed and few sizes; three seeds and all of them: the study
            if place != "logits":
                assert mine.start_slope < 0.05
                # By how much standard grows depends on how much of a change the embedding's own is: least in Mamba-1.
                assert standard.change_slope > max(0.05, mine.change_slope) + 0.05


def test_a_family_is_widened_with_its_options():
    small, large = (coords.shape("xlstm:mixer=slstm", "mup", width, 2, (64, 2)).model for width in (64, 256))
    for model, heads, hidden in ((small, 4, 96), (large, 16, 384)):
        assert model.blocks == (("slstm", "mlp"),)
        assert (model.slstm.heads, model.mlp.hidden, model.mlp.kind) == (heads, hidden, "geglu")
    assert (large.mup.base_width, large.mup.base_layers) == (64, 2)
    plain = coords.shape("xlstm", "mup", 256, 2, (64, 2)).model
    assert plain.blocks == (("mlstm", "mlp"),)


def planted():
    """size = width^a, change = width^b, exactly; and a depth along which both are constant."""
    rows = []
    for width in (64, 256, 1024):
        for step in (0, 3):
            change = 0.0 if step == 0 else width**0.5
            rows.append({"parametrization": "mup", "along": "width", "width": width, "layers": 2, "seed": 0,
                         "step": step, "place": "logits", "size": width**-0.25, "change": change})  # fmt: skip
            rows.append(rows[-1] | {"along": "depth", "width": 64, "layers": width, "size": 2.0, "change": 3.0})
    return pd.DataFrame(rows)


def test_slopes_are_those_of_planted_powers():
    found = coords.slopes(planted()).set_index("along")
    np.testing.assert_allclose(found.loc["width", ["start_slope", "change_slope"]].astype(float), [-0.25, 0.5])
    np.testing.assert_allclose(found.loc["width", ["start_ratio", "change_ratio"]].astype(float), [2, 4])
    np.testing.assert_allclose(found.loc["depth", ["start_slope", "change_slope"]].astype(float), [0, 0], atol=1e-12)


def test_the_plot_draws_what_the_table_holds():
    ax = model_plots.coordinates(planted(), "width", "change")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(w, w**0.5) for w in (64, 256, 1024)])
    again = model_plots.coordinates(planted(), "depth", "size", ax=plots.new_axes())
    np.testing.assert_allclose(again.lines[0].get_ydata(), 2.0)
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_csv_and_picture(tmp_path):
    done = scalelab(
        "bench", "coords", "--family=mamba2", "--parametrizations=standard,mup", "--widths=32,64", "--depths=4",
        "--steps=1", "--out=found.csv", "--plot=pictures/found.png", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mup" in done.stdout and "last block" in done.stdout  # noqa: PT018
    table = pd.read_csv(tmp_path / "found.csv")
    assert set(table["width"]) == {32, 64}
    assert set(table["step"]) == {0, 1}
    assert (tmp_path / "pictures" / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ("mu",)}, "must be one of standard, mup, completep"),
        ({"widths": (64,), "depths": (2,)}, "to compare"),
        ({"widths": (0, 64)}, "must be at least 1"),
        ({"family": "perceptron"}, "must be one of transformer"),
        ({"family": "xlstm:mixer=gru"}, "must be one of mlstm, mlstm_up, slstm"),
        ({"family": "hybrid:every=0"}, "must be at least 1"),
        ({"family": "mamba:mixer=mamba2"}, "no such field"),
        ({"family": "xlstm:mixer=slstm", "widths": (64, 96), "depths": (3,)}, None),
        ({"family": "gla", "widths": (64, 96), "depths": (3,)}, None),
        ({"family": "transformer", "widths": (64, 80), "depths": (2,)}, "makes attention.heads = 2.5"),
    ],
)
def test_what_cannot_be_checked_is_refused(options, says, monkeypatch):
    monkeypatch.setattr(
        coords,
        "sizes",
        lambda conf, steps, seeds: iter(
            [{"seed": 0, "step": s, "place": "logits", "size": 1.0, "change": 1.0} for s in (0, 4)]
        ),
    )
    if says is None:
        assert coords.main(**options) == 0
        return
    with pytest.raises(BadInput, match=says):
        coords.main(**options)


# ------------------------------------------------------------------------------------ recipes and the sweep


@pytest.mark.parametrize("reference", [*recipe.FAMILIES, *PAPERS])
def test_the_base_of_a_recipes_model_is_the_recipes_model(reference):
    """Also where it differs in more than the width: the fan-ins of the base are those of the recipe's own shape."""
    family, options = recipe.with_options(reference)
    for width in (192, 512):
        small_shape = recipe.shape(family, 64, **options)
        shape = recipe.transferred("completep", recipe.shape(family, width, **options), small_shape)
        model = config.override(config.base(), {**shape, "model.vocab_size": 64}).model
        spec = models.registry.resolve(model)
        small = config.override(config.base(), {**small_shape, "model.vocab_size": 64}).model
        assert spec.blocks[0].mixer_base == models.registry.resolve(small).blocks[0].mixer_options
        assert spec.blocks[0].channel_base == models.registry.resolve(small).blocks[0].channel_options
        assert (spec.base.width, spec.base_layers) == (64, small.layers)
        assert shape["optim.lr"] == small_shape["optim.lr"]


def test_the_configs_take_a_parametrization():
    plain, scaled = (config.load(f"transformer:size=m{more}") for more in ("", ",parametrization=completep"))
    assert plain.model.parametrization == "standard"
    assert scaled.model.mup.base_width == 64
    assert scaled.optim.lr == recipe.learning_rate(64) > plain.optim.lr
    mamba = config.load("mamba:size=m,parametrization=mup,base=128")
    assert (mamba.model.mup.base_width, mamba.optim.lr) == (128, recipe.learning_rate(128))
    with pytest.raises(BadInput, match="must be one of standard, mup, completep"):
        config.load("moe:parametrization=np")


@pytest.mark.parametrize("family", ["transformer", "mamba2", "xlstm", "moe"])
def test_the_sweep_widens_one_shape(family):
    found = sweep.expand(f"lr_transfer:family={family},widths=32:64:128,lrs=1e-3:2e-3", {})
    assert not found.dropped
    seen = {}
    for run in found.runs:
        c = run.spec.config
        seen.setdefault((c.model.parametrization, c.model.width), []).append(c.optim.lr)
        assert c.model.layers == found.runs[0].spec.config.model.layers
        assert c.model.mup.base == ()
        model = config.override(c.model, {"vocab_size": 257})
        rules = models.rules(model)
        if c.model.width == 128 and rules:
            assert rules["period"]["0"]["mixer"]["out"] == Rule(0.25, 4.0, 0.25)
    shapes = [("standard", 32), ("standard", 64), ("mup", 64), ("standard", 128), ("mup", 128)]
    assert seen == {shape: [1e-3, 2e-3] for shape in shapes}
