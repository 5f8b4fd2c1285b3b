"""The vocabulary law: planted truth with losses below zero, tied exponents, its limits."""

import itertools

import numpy as np
import pandas as pd

from scalelab import laws
from scalelab.laws.forms import Vocabulary

TRUTH = {"E": 6.0, "A1": 60.0, "A2": 40.0, "B": 800.0, "alpha1": 0.3, "alpha2": 0.25, "beta": 0.35}


def planted(params=TRUTH, noise=0.0):
    sizes = ((33e6, 512), (85e6, 768), (300e6, 1024), (1.1e9, 2048))
    rows = itertools.product(sizes, (4096, 16384, 65536, 262144), (1e9, 4e9, 1.6e10, 6e10))
    table = pd.DataFrame(
        [(n, v, d, t) for (n, d), v, t in rows], columns=["params_non_embedding", "vocab_size", "width", "tokens"]
    )
    scatter = noise * np.random.default_rng(0).standard_normal(len(table))
    return table.assign(loss=Vocabulary().predict(params, table) + scatter)


def test_recovers_planted_truth_below_zero():
    table = planted()
    assert (table.loss < 0).all()
    fit = laws.fit("vocabulary", table, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(TRUTH.values()), rtol=1e-5)
    assert fit.record["agreement"] >= 0.5
    assert not {"E-above-min-loss", "E-below-zero", "at-bound"} & {n.code for n in fit.warnings}
    assert fit.ok


def test_losses_of_either_sign():
    table = planted(TRUTH | {"E": 1.2})
    assert table.loss.min() < 0 < table.loss.max()
    fit = laws.fit("vocabulary", table, bootstrap=0)
    np.testing.assert_allclose(fit.predict(table), table.loss, atol=1e-7)
    assert fit.ok


def test_intervals_hold_the_truth_under_noise():
    fit = laws.fit("vocabulary", planted(noise=0.003), bootstrap=100)
    interval = fit.conf_int(0.999)
    for name, value in TRUTH.items():
        assert interval.lower[name] <= value <= interval.upper[name]


def test_the_authors_tie_size_to_data():
    truth = TRUTH | {"alpha1": 0.35}
    fit = laws.fit("vocabulary", planted(truth), tied={"alpha1": "beta"}, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(truth.values()), rtol=1e-5)


def test_only_the_product_of_vocabulary_and_width_counts():
    law, x = Vocabulary(), {"params_non_embedding": [1e9], "tokens": [1e10]}
    a = law.predict(TRUTH, x | {"vocab_size": [32000], "width": [2048]})
    b = law.predict(TRUTH, x | {"vocab_size": [64000], "width": [1024]})
    assert a[0] == b[0]
    endless = {role: [1e60] for role in law.inputs}
    np.testing.assert_allclose(law.predict(TRUTH, endless), -6.0, rtol=1e-9)


def test_default_objective_is_on_the_value_and_fits_load(tmp_path):
    fit = laws.fit("vocabulary", planted(noise=0.003), bootstrap=10)
    assert "model - data" in fit.summary()
    loaded = laws.load(fit.save(tmp_path / "fit.json"))
    assert (loaded.fittedvalues == fit.fittedvalues).all()
