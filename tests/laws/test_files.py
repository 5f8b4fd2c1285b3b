"""Fit files: an exact round trip of every law, and the files of earlier versions."""

import json
import pathlib

import numpy as np
import pandas as pd
import pytest
from planted import best_size, constants_of, rows_of

from scalelab import laws
from scalelab.laws.forms import DataMixture, Precision, RepeatedPools, Speculative, UtilityDecay

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"


def round_trip(fit, tmp_path):
    again = laws.load(fit.save(tmp_path / "fit.json"))
    pd.testing.assert_series_equal(again.params, fit.params, check_exact=True)
    pd.testing.assert_frame_equal(again.draws, fit.draws, check_exact=True)
    pd.testing.assert_series_equal(again.resid, fit.resid, check_exact=True)
    assert again.law.inputs == fit.law.inputs
    assert again.options == fit.options
    assert json.dumps(again.record) == json.dumps(fit.record)
    assert repr(again.warnings) == repr(fit.warnings)
    assert {"objective", "delta", "starts", "seed", "data_sha256", "versions"} <= set(again.record)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "fit.json").read_bytes()


@pytest.mark.parametrize("name", laws.available())
def test_every_law_comes_back_exactly(name, tmp_path):
    law = laws.LAWS[name]()
    # two parameters are enough to have draws and findings of, and quick to fit
    held = {} if name in ("farseer", "ladder", "moe-sparsity") else dict([*constants_of(law).items()][2:])
    round_trip(law.fit(rows_of(law, 12), bootstrap=3, starts=2, fixed=held), tmp_path)


@pytest.mark.parametrize(
    "law",
    [
        DataMixture("web", "code"),
        Precision("weights"),
        RepeatedPools("web"),
        UtilityDecay("best"),
        Speculative(("tokens",)),
        laws.PowerLaw("tokens"),
        laws.BrokenPower(2, "params"),
    ],
    ids=lambda law: law.name,
)
def test_what_a_law_was_made_of_is_in_the_file(law, tmp_path):
    columns = {"web": np.linspace(0.1, 0.9, 24), "code": np.linspace(0.9, 0.1, 24)}
    table = rows_of(law) if law.name != "data-mixture" else pd.DataFrame(columns).assign(loss=2 + columns["web"] ** 2)
    round_trip(law.fit(table, bootstrap=0, starts=1), tmp_path)


SCHEMA_2 = ("fit_schema2.json", "isoflop_schema2.json", "shared_schema2.json", "comparison_schema2.json")


@pytest.mark.parametrize("name", SCHEMA_2)
def test_files_of_schema_2_still_load(name, tmp_path):
    """Written by version 0.1.0 from planted runs; a later version reads them and finds the same numbers in them."""
    stored = json.loads((FIXTURES / name).read_text(encoding="utf-8"))
    assert stored["schema"] == 2
    found = laws.load(FIXTURES / name)
    written = json.loads(found.save(tmp_path / name).read_text(encoding="utf-8"))
    same = [key for key in stored if key != "schema"]
    assert {key: written[key] for key in same} == {key: stored[key] for key in same}
    if name == "comparison_schema2.json":
        assert found.table().verdict.tolist() == stored["contrasts"]["verdict"][: len(found.table())]
        assert "crossing" in found.summary()
        return
    assert found.params.to_dict() == stored["params"]
    assert found.draws.shape == (len(stored["draws"]), len(stored["params"]))
    assert found.record["data_sha256"] in json.dumps(stored)


def test_what_a_fit_of_schema_2_says():
    """Its options, in numbers and in use: fixed values, a Huber width from the residuals, clusters, strata, weights."""
    fit = laws.load(FIXTURES / "fit_schema2.json")
    assert (fit.options.objective.kind, fit.options.objective.on) == ("huber", "log")
    assert fit.options.objective.delta == fit.record["delta"] > 0
    assert fit.options.fixed == {"beta": 0.37}
    assert (fit.record["cluster"], fit.record["weights"], fit.record["seed"]) == ("group", "w", 3)
    assert fit.rows.strata is not None
    assert fit.refit().params.to_dict() == pytest.approx(fit.params.to_dict(), rel=1e-7)
    assert fit.optimal(1e20).params == pytest.approx(best_size(1e20), rel=0.3)
    shared = laws.load(FIXTURES / "shared_schema2.json")
    assert shared.shared == ("E", "B", "beta")
    assert shared.arm("new").optimal(1e20).loss < shared.arm("old").optimal(1e20).loss
