"""The report: self-contained, complete, honest about fits that must not be used."""

import html.parser
import io
import pathlib
import re
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

sys.path.insert(0, str(pathlib.Path(__file__).parent / "laws"))
from planted import TRUTH, best_size, curves, sweep

from scalelab import laws, report, report_fits
from scalelab.errors import BadInput
from scalelab.plots import human
from scalelab.report_terminal import terminal


class Checker(html.parser.HTMLParser):
    """Every tag closed in order, and nothing fetched from anywhere."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.outside.append(value)
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def world():
    table = sweep(noise=0.003)
    table.loc[5, ["status", "loss"]] = ["diverged", np.nan]
    fit = laws.fit("chinchilla", table, bootstrap=60)
    return table, fit, laws.isoflop(table, bootstrap=60)


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    table, fit, isoflop = world
    path = report.write(
        tmp_path_factory.mktemp("report") / "deep" / "report.html",
        table,
        curves(table),
        {"chinchilla": fit},
        isoflop,
        title="Sweep <one>",
        command="scalelab sweep --config=isoflop",
        notes=["Trained & done."],
    )
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_self_contained_and_well_formed(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.outside == []
    assert "http://" not in page
    assert "https://" not in page


def test_every_section_is_there(page, world):
    for heading in ("Fitted laws", "Figures", "Hold-out check", "Findings", "Runs", "How it was fitted"):
        assert re.search(f"<h2[^>]*>{heading}</h2>", page)
    assert page.count("<figure>") == 6
    assert "Sweep &lt;one&gt;" in page
    assert "Trained &amp; done." in page
    assert "scalelab sweep --config=isoflop" in page
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page
    table, fit, _ = world
    assert fit.record["data_sha256"] in page
    assert "delta = 0.001" in page
    assert "run-not-done" in page
    for run in table.id:
        assert run in page


def test_the_headline_is_the_optimum_with_intervals(world):
    _, fit, isoflop = world
    text = re.sub("<.*?>", "", " ".join(report.headline({"chinchilla": fit}, isoflop)))
    best = fit.optimal([1e20, 1e21])
    for row in best.itertuples():
        for name in ("params", "tokens"):
            low, high = getattr(row, f"{name}_lower"), getattr(row, f"{name}_upper")
            assert f"{human(getattr(row, name))} [{human(low)}, {human(high)}]" in text
    assert "C = 1e+20" in text
    assert "IsoFLOP parabolas (3 of 3 budgets)" in text


def test_a_fit_that_must_not_be_used_gives_no_answer(tmp_path):
    N = np.geomspace(1e7, 1e9, 12)
    table = sweep().iloc[:12].assign(params=N, tokens=20 * N, flops=120 * N**2)
    fit = laws.fit("chinchilla", table, bootstrap=20)
    assert not fit.ok
    text = " ".join(report.headline({"chinchilla": fit}))
    assert "No answer" in text
    assert "collinear-ND" in text
    assert "train <b>N" not in text
    page = report.write(tmp_path / "r.html", table, fits={"chinchilla": fit}).read_text()
    assert "No answer" in page
    assert "95 % interval" in page


def test_refused_budgets_are_told(tmp_path):
    table = sweep(noise=0.002)
    table = table[~((table.flops == 1e20) & (table.params > best_size(1e20)))]
    isoflop = laws.isoflop(table, bootstrap=20)
    page = report.write(tmp_path / "r.html", table, isoflop=isoflop).read_text()
    assert "refused: the minimum lies above the sizes tried" in page
    assert "isoflop-unbracketed" in page


def test_a_table_alone_still_makes_a_report(tmp_path):
    table = sweep()[["params", "tokens", "loss"]]
    page = report.write(tmp_path / "r.html", table).read_text()
    assert "No law was fitted" in page
    assert "18 runs" in page


@pytest.fixture(scope="module")
def families():
    better = sweep(noise=0.003, seed=1, truth={**TRUTH, "A": 250.0}).assign(family="mamba")
    few = sweep(noise=0.003).iloc[:3].assign(family="xlstm")
    table = pd.concat([better, sweep(noise=0.003), few], ignore_index=True)
    return table.assign(id=[f"{i:012x}" for i in range(len(table))])


def test_families_are_fitted_apart_and_compared(families, tmp_path):
    found = report_fits.fitted(families, 60)
    assert list(found.fits) == ["transformer", "mamba"]
    assert list(found.isoflop) == ["transformer", "mamba"]
    assert [n.split(":")[0] for n in found.notes] == ["xlstm is left out"]
    own = {name: families[families.family == name] for name in found.fits}
    costs = {k: laws.flops_per_token(t.params, t.tokens, t.flops) for k, t in own.items()}
    expected = laws.compare(own, law="chinchilla", bootstrap=60, cost=costs)
    pd.testing.assert_frame_equal(found.comparison.contrasts, expected.contrasts)

    page = report.write(
        tmp_path / "r.html", families, fits=found.fits, isoflop=found.isoflop, comparison=found.comparison,
        notes=found.notes,
    ).read_text()  # fmt: skip
    checker = Checker()
    checker.feed(page)
    assert checker.open == checker.outside == []
    assert "<h2>Families compared</h2>" in page
    row = expected.table().iloc[0]
    interval = f"{row.multiplier:.3g} × [{row.multiplier_lower:.3g}, {row.multiplier_upper:.3g}]"
    assert f"<td>{interval}</td>" in page
    assert (
        page.count("<figure>") == 3 + 2 * 4
    )  # multiplier, difference, allocation; parabolas, surface, residuals, hold-out
    assert "xlstm is left out" in page
    assert "(comparison)" in page  # its findings are among the others
    text = re.sub("<.*?>", "", page)
    assert re.search(r"mamba needs 0\.\d+ \[0\.\d+, 0\.\d+\] times the compute of transformer.*: mamba is better", text)
    assert re.search(r"mamba\. At the largest budget, C = 1e\+20 FLOP: train N", text)
    out = io.StringIO()
    terminal(found.fits, found.isoflop, Console(file=out, width=160), found.comparison)
    for word in ("Against transformer", interval, "IsoFLOP, mamba minima", "[unpaired]"):
        assert word in out.getvalue()


def test_one_family_is_reported_as_ever(families):
    one = families[families.family == "mamba"]
    found = report_fits.fitted(one, 20)
    assert list(found.fits) == ["chinchilla"]
    assert isinstance(found.isoflop, laws.IsoflopFit)
    assert found.comparison is None
    with pytest.raises(BadInput, match=r"no family can be fitted; .*rows"):
        report_fits.fitted(pd.concat([one.iloc[:3], one.iloc[3:6].assign(family="b")]), 20)


def test_writing_where_one_cannot(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        report.write(tmp_path / "file" / "r.html", sweep())


def test_terminal(world):
    _, fit, isoflop = world
    out = io.StringIO()
    terminal({"chinchilla": fit}, isoflop, Console(file=out, width=160))
    text = out.getvalue()
    for word in ("alpha", "95 % interval", "N*", "hold-out: fitted to", "IsoFLOP minima", "[run-not-done]", "1e+21"):
        assert word in text
    e = fit.params.E
    assert f"{e:.4g}" in text


def test_terminal_with_a_table_from_pandas_types(world):
    """Nullable columns, as a JSONL or Parquet file may bring them."""
    table, *_ = world
    typed = table.convert_dtypes()
    assert isinstance(typed.dtypes["params"], pd.api.extensions.ExtensionDtype)
    fit = laws.fit("chinchilla", typed, bootstrap=10)
    out = io.StringIO()
    terminal({"chinchilla": fit}, None, Console(file=out, width=160))
    assert "alpha" in out.getvalue()
