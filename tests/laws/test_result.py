"""Tables in and fits out: reading, disk round trips, schema."""

import json
import pathlib

import numpy as np
import pandas as pd
import pytest
from planted import sweep

from scalelab import laws
from scalelab.errors import BadInput


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".jsonl", ".parquet"])
def test_read_table(tmp_path, suffix):
    table = sweep(noise=0.003)
    path = tmp_path / f"runs{suffix}"
    if suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True, double_precision=15)
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    read = laws.read_table(path)
    np.testing.assert_allclose(read.loss, table.loss, rtol=1e-12)
    assert read.id.tolist() == table.id.tolist()


def test_a_fit_takes_what_holds_a_table(tmp_path):
    """Files, dicts of arrays and tables of other libraries, in fits and predictions."""
    table = sweep(noise=0.003)
    table.to_csv(tmp_path / "runs.csv", index=False)
    arrow = pytest.importorskip("pyarrow").Table.from_pandas(table)
    want = laws.fit("chinchilla", table, bootstrap=0)
    for other in (tmp_path / "runs.csv", str(tmp_path / "runs.csv"), arrow, table.to_dict("list")):
        fit = laws.fit("chinchilla", other, bootstrap=0)
        np.testing.assert_allclose(fit.params, want.params, rtol=1e-9)
        np.testing.assert_allclose(fit.predict(other), want.fittedvalues, rtol=1e-9)
    assert laws.isoflop(arrow, bootstrap=0).params.equals(laws.isoflop(table, bootstrap=0).params)
    with pytest.raises(BadInput, match="must be a DataFrame, a mapping of columns, or a file's path"):
        laws.fit("chinchilla", [1, 2, 3])


def test_unreadable_tables(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        laws.read_table(tmp_path / "none.csv")
    (tmp_path / "runs.xls").write_text("x")
    with pytest.raises(BadInput, match=r"\.csv"):
        laws.read_table(tmp_path / "runs.xls")
    for name, text in (("empty.csv", ""), ("head.csv", "params,tokens,loss\n"), ("bad.jsonl", "{oops")):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=name):
            laws.read_table(tmp_path / name)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81" * 10)
    with pytest.raises(BadInput, match=r"binary.csv"):
        laws.read_table(tmp_path / "binary.csv")


def test_bad_tables_are_named():
    table = sweep()
    with pytest.raises(BadInput, match="needs a column tokens"):
        laws.fit("chinchilla", table.drop(columns="tokens"))
    with pytest.raises(BadInput, match=r"columns\[tokens\].*'D'"):
        laws.fit("chinchilla", table, columns={"tokens": "D"})
    with pytest.raises(BadInput, match="is no role"):
        laws.fit("chinchilla", table, columns={"token": "tokens"})
    with pytest.raises(BadInput, match="hold numbers"):
        laws.fit("chinchilla", table.assign(loss="low"))
    with pytest.raises(BadInput, match="one length"):
        laws.fit("chinchilla", {"params": [1.0], "tokens": [1.0, 2.0], "loss": [1.0]})
    with pytest.raises(BadInput, match="nothing to fit"):
        laws.fit("chinchilla", table.iloc[:0])
    with pytest.raises(BadInput, match="DataFrame"):
        laws.fit("chinchilla", [1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="delta"):
        laws.fit("chinchilla", table, delta=0.0)
    with pytest.raises(BadInput, match="cluster"):
        laws.fit("chinchilla", table, cluster="run")
    with pytest.raises(BadInput, match="2 of them"):
        laws.fit("chinchilla", table.assign(run=0), cluster="run")
    with pytest.raises(BadInput, match="weights"):
        laws.fit("chinchilla", table, weights=[1.0])


def test_disk_round_trip_is_exact(tmp_path):
    table = sweep(noise=0.003)
    table.loc[4, ["status", "loss"]] = ["diverged", np.nan]
    draws = np.tile(np.delete(np.arange(18), 4), (7, 1))
    draws[0] = 0  # a draw that fails: NaN must survive the disk
    for bootstrap in (60, draws):
        fit = laws.fit("chinchilla", table, bootstrap=bootstrap, columns={"params": "params"})
        fit.optimal(1e22)
        again = laws.load(fit.save(tmp_path / "new" / "fit.json"))
        pd.testing.assert_series_equal(again.params, fit.params, check_exact=True)
        pd.testing.assert_frame_equal(again.draws, fit.draws, check_exact=True)
        pd.testing.assert_series_equal(again.resid, fit.resid, check_exact=True)
        assert again.record == fit.record
        assert again.warnings == fit.warnings
        assert again.optimal(1e20).equals(fit.optimal(1e20))
        assert again.holdout().table.equals(fit.holdout().table)
        assert again.summary() == fit.summary()
        again.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "fit.json").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["fit.json"]  # no half-written neighbour


def test_the_file_says_how(tmp_path):
    fit = laws.fit("chinchilla", sweep(noise=0.003), bootstrap=10, seed=7)
    document = json.loads(fit.save(tmp_path / "fit.json").read_text())
    record = document["record"]
    assert document["schema"] == 2
    assert record["delta"] == 1e-3
    assert record["seed"] == 7
    assert record["starts"] == 8
    assert len(record["data_sha256"]) == 64
    assert {"scalelab", "numpy", "python", "pandas"} <= set(record["versions"])


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "fit.json"
    with pytest.raises(BadInput, match="cannot be read"):
        laws.load(path)
    for text in ("{", "[]", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(BadInput, match="not a fit"):
            laws.load(path)
    fit = laws.fit("chinchilla", sweep(), bootstrap=0)
    document = json.loads(fit.save(path).read_text())
    path.write_text(json.dumps(document | {"schema": 99}))
    with pytest.raises(BadInput, match="upgrade"):
        laws.load(path)
    path.write_text(json.dumps(document | {"law": "of the land"}))
    with pytest.raises(BadInput, match=r"none of .*chinchilla"):
        laws.load(path)
    with pytest.raises(BadInput, match="cannot be written"):
        fit.save(path / "inside-a-file.json")


def test_levels():
    fit = laws.fit("chinchilla", sweep(noise=0.003), bootstrap=100)
    narrow, wide = fit.conf_int(0.5), fit.conf_int(0.99)
    assert ((wide.upper - wide.lower) > (narrow.upper - narrow.lower)).all()
    with pytest.raises(BadInput, match="level"):
        fit.conf_int(95)


@pytest.mark.parametrize("name", ["fit_schema1.json", "isoflop_schema1.json"])
def test_files_of_schema_1_still_load(name, tmp_path):
    """Written by version 0.1.0; a later version reads them and writes the same numbers again."""
    path = pathlib.Path(__file__).parent.parent / "fixtures" / name
    stored = json.loads(path.read_text(encoding="utf-8"))
    fit = laws.load(path)
    assert fit.params.to_dict() == stored["params"]
    assert np.isfinite(fit.conf_int().to_numpy()).all()
    fit.save(tmp_path / name)
    assert json.loads((tmp_path / name).read_text(encoding="utf-8"))["draws"] == stored["draws"]
