"""Tables drawn from laws and fits."""

import numpy as np
import pytest
from planted import TRUTH, law, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.objective import SQUARES
from scalelab.laws.simulate import simulate

DESIGN = sweep(sizes=5)


def test_without_noise_it_is_the_law():
    table = simulate("chinchilla", DESIGN, 0.0, params=TRUTH)
    np.testing.assert_allclose(table["loss"], law(DESIGN["params"], DESIGN["tokens"]), rtol=1e-12)
    assert list(table.columns) == list(DESIGN.columns)
    assert table.index.equals(DESIGN.index)
    published = simulate(laws.Chinchilla(), DESIGN, 0.0, params="Besiroglu 2024")
    np.testing.assert_allclose(published["loss"], laws.Chinchilla().predict("Besiroglu 2024", DESIGN))


def test_noise_has_the_size_and_the_scale_asked_for():
    design = {name: np.tile(DESIGN[name], 200) for name in ("params", "tokens")}
    exact = law(design["params"], design["tokens"])
    drawn = simulate("chinchilla", design, 0.01, seed=3, params=TRUTH)["loss"]
    assert np.log(drawn / exact).std() == pytest.approx(0.01, rel=0.05)
    assert simulate("chinchilla", design, 0.01, seed=3, params=TRUTH)["loss"].equals(drawn)
    assert not simulate("chinchilla", design, 0.01, seed=4, params=TRUTH)["loss"].equals(drawn)
    on_values = laws.fit("chinchilla", sweep(sizes=5, noise=0.002), objective=SQUARES, bootstrap=0)
    drawn = simulate(on_values, design, 0.05)["loss"]
    assert (drawn - on_values.predict(design)).std() == pytest.approx(0.05, rel=0.05)


def test_a_fit_lends_its_residuals():
    fit = laws.fit("chinchilla", sweep(sizes=6, noise=0.004, seed=2), bootstrap=0)
    design = {name: np.tile(DESIGN[name], 400) for name in ("params", "tokens")}
    noise = np.log(simulate(fit, design, seed=1)["loss"] / fit.predict(design)).to_numpy()
    n, P = fit.nobs, 5
    centred = (fit.resid - fit.resid.median()).to_numpy()
    assert np.sqrt((noise**2).mean()) == pytest.approx(np.sqrt((centred**2).sum() / (n - P)), rel=0.05)
    kept = np.sort(np.abs(centred))[P:]  # the rows that the Huber fit goes through would be a spike at zero
    seen = np.unique(np.abs(noise).round(9))
    assert len(seen) == n - P
    np.testing.assert_allclose(seen / seen.max(), kept / kept.max(), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"law": "chinchilla", "noise": 0.1}, "params"),
        ({"law": "chinchilla", "params": TRUTH}, "noise"),
        ({"law": "chinchilla", "noise": -1.0, "params": TRUTH}, "noise"),
        ({"law": "chinchila", "noise": 0.0, "params": TRUTH}, "law"),
    ],
)
def test_what_cannot_be_drawn(arguments, field):
    with pytest.raises(BadInput) as error:
        simulate(arguments.pop("law"), DESIGN, **arguments)
    assert error.value.field == field


def test_a_fit_takes_no_other_constants():
    fit = laws.fit("chinchilla", DESIGN, bootstrap=0)
    with pytest.raises(BadInput, match="its own"):
        simulate(fit, DESIGN, 0.0, params=TRUTH)
    mine = laws.define("mine", lambda p, x: p.k / (x.params - 1.0), inputs=("params",), k=laws.positive(1, 2))
    with pytest.raises(BadInput, match="no finite value"):
        simulate(mine, {"params": [1.0, 2.0]}, 0.0, params={"k": 1.0})
