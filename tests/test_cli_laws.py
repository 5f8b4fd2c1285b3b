"""Laws at the command line: every law, what each command prints and saves, and one line for what it cannot do."""

import pathlib
import re
import sys

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "laws"))
from planted import TRUTH, constants_of, curves, rows_of, sweep

from scalelab import laws
from tests.helpers import ask
from tests.test_records import make

pytestmark = pytest.mark.once
BETTER = {**TRUTH, "A": 250.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables of two arms and of both, and fits of several kinds."""
    where = tmp_path_factory.mktemp("laws")
    old, new = sweep(noise=0.003), sweep(noise=0.003, seed=1, truth=BETTER).assign(family="mamba")
    old.to_csv(where / "old.csv", index=False)
    new.to_csv(where / "new.csv", index=False)
    both = pd.concat([new, old]).assign(point=[*range(18), *range(18)])
    both.to_csv(where / "both.csv", index=False)
    old[["params", "tokens", "loss"]].set_axis(["N", "D", "L"], axis=1).to_csv(where / "named.csv", index=False)
    old.iloc[:4].to_csv(where / "few.csv", index=False)
    old.assign(loss=[np.nan, *old.loss[1:]]).to_csv(where / "hole.csv", index=False)
    curves(old).merge(old[["id", "params"]]).to_csv(where / "curves.csv", index=False)
    laws.fit("chinchilla", old, bootstrap=100).save(where / "fit.json")
    laws.isoflop(old, bootstrap=50).save(where / "isoflop.json")
    laws.fit("power", old, bootstrap=20).save(where / "power.json")
    arms = {"old": old, "new": new}
    laws.fit_shared(arms, bootstrap=60).save(where / "shared.json")
    laws.compare(arms, [1e19], law="chinchilla", bootstrap=60).save(where / "comparison.json")
    joint = laws.LAWS["joint-moe"]()
    held = dict([*constants_of(joint).items()][2:])
    joint.fit(rows_of(joint), bootstrap=60, fixed=held).save(where / "moe.json")
    (where / "file").write_text("in the way")
    return where


def good(folder, *commands):
    """The outputs of commands that must work."""
    answers = ask([c.split() if isinstance(c, str) else c for c in commands], folder)
    for command, (status, _, err) in zip(commands, answers, strict=True):
        assert status == 0, (command, err)
        assert err == ""
    return [out for _, out, _ in answers]


BAD = {
    "fit": "table = None: name a run folder",
    "fit --list old.csv": "--list = 'old.csv': goes without a table",
    "fit old.csv --law=kaplin": "did you mean kaplan?",
    "fit old.csv --law=power:2,3,4": "power is made of column",
    "fit old.csv --law=data-mixture:web": "--law = 'data-mixture:web': name two or more",
    "fit named.csv": "name yours: --columns params=...",
    "fit named.csv --columns params=N,tokens=D,loss=M": "--columns loss = 'M': no such column",
    "fit named.csv --columns params=N,params=D": "--columns = 'params=D': params is given twice",
    "fit named.csv --columns N": "--columns = 'N': must be ROLE=NAME",
    "fit named.csv --columns size=N": "--columns = 'size': is no role of this law",
    "fit old.csv --objective=cubes": "--objective = 'cubes': must be one of huber",
    "fit old.csv --delta=wide": "--delta = 'wide': must be a number",
    "fit old.csv --delta=-1": "--delta = -1.0: must be above 0",
    "fit old.csv --fix E": "--fix = 'E': must be NAME=VALUE",
    "fit old.csv --fix E=low": "--fix E = 'low': must be a number",
    "fit old.csv --fix F=1.7": "--fix = 'F': must be one of E, A, B, alpha, beta",
    "fit old.csv --tie alpha=gamma": "--tie alpha = 'gamma': must be one of E, A, B, alpha, beta",
    "fit old.csv --weights=w": "--weights = 'w': no such column",
    "fit old.csv --cluster=run": "--cluster = 'run': no such column",
    "fit old.csv --stratify=run": "--stratify = 'run': no such column",
    "fit old.csv --resample=jackknife": "invalid choice: 'jackknife'",
    "fit old.csv --bootstrap=-5": "--bootstrap = -5: must be 0",
    "fit old.csv --at": "expected at least one argument",
    "fit old.csv --at 0": "--at = [0.0]: must be positive FLOPs",
    "fit old.csv --at inf": "--at = [inf]: must be positive FLOPs",
    "fit old.csv --at 1e20 --cost=free": "--cost = 'free': must be a number",
    "fit old.csv --at 1e20 --cost=0": "--cost = '0': must be above 0",
    "fit old.csv --at 1e20 --with experts=8": "--with experts = 8.0: is no further input of chinchilla",
    "fit old.csv --at 1e20 --law=power": "--at = 'power': has no compute-optimal allocation",
    "fit old.csv --at 1e20 --law=joint-moe": "joint-moe needs a value for each: --with experts=...",
    "fit few.csv": "4 rows",
    "fit hole.csv": "--drop leaves such rows out",
    "fit file": "must be a .csv, .tsv, .jsonl or .parquet file",
    "fit old.csv --bootstrap=0 --out=file/fit.json": "--out = 'file/fit.json': cannot be written",
    "fit old.csv --law=isoflop --objective=squares": "--objective = 'squares': does not go with --law isoflop",
    "fit old.csv --law=isoflop --fix E=1": "--fix = ['E=1']: does not go with --law isoflop",
    "fit old.csv --law=envelope --cluster=none": "--cluster = 'none'",
    "compare old.csv": "arms = 'old.csv': must be NAME=PATH",
    "compare a=old.csv": "a comparison needs two arms",
    "compare a=old.csv a=new.csv": "that name is another arm's already",
    "compare a=old.csv b=nowhere.csv": "no such file",
    "compare both.csv --by=team": "--by = 'team': no such column",
    "compare old.csv --by=family": "--by = 'family': a comparison needs two arms",
    "compare both.csv old.csv --by=family": "--by = 'family': splits one table",
    "compare both.csv --by=family --reference=rnn": "--reference = 'rnn': must be one of transformer, mamba",
    "compare both.csv --by=family --pair=colour": "--pair = 'colour': no such column",
    "compare a=old.csv b=new.csv --law=routing": "needs a column",
    "compare a=old.csv b=new.csv --law=critical-batch-of-loss": "has no optimal loss at a compute",
    "compare a=old.csv b=new.csv --at=1e18:": "--at = '1e18:': must be a number",
    "compare a=old.csv b=new.csv --at=1e20:1e18": "must be LOW:HIGH",
    "compare a=old.csv b=new.csv --at much": "--at = 'much': must be a number",
    "compare a=old.csv b=new.csv --level=95": "--level = 95.0: must lie between 0 and 1",
    "compare a=old.csv b=new.csv --out=table.xls": "--out = 'table.xls': must end in .png, .svg, .pdf, .json",
    "compare a=old.csv b=new.csv --bootstrap=0 --out=file/m.png": "--out = 'file/m.png': cannot be written",
    "compare a=fit.json b=isoflop.json": "is no fit of a law but of kind isoflop",
    "compare a=fit.json b=fit.json --objective=squares": "--objective = 'squares': goes with tables",
    "plan": "needs either --config or --from",
    "plan --config=isoflop --from=fit.json": "needs either --config or --from",
    "plan --config=isoflop --flops 1e20": "--flops = [1e+20]: goes with --from",
    "plan --from=fit.json": "--flops = None: name the budgets",
    "plan --from=fit.json --flops much": "invalid float value",
    "plan --from=fit.json --flops=-1": "--flops = [-1.0]: must be positive FLOPs",
    "plan --from=nowhere.json --flops 1e20": "--from = 'nowhere.json': cannot be read",
    "plan --from=old.csv --flops 1e20": "--from = 'old.csv': is not a fit saved by scalelab",
    "plan --from=power.json --flops 1e20": "--from = 'power': has no compute-optimal allocation",
    "plan --from=comparison.json --flops 1e20": "--from = 'comparison': allocates no compute",
    "plan --from=moe.json --flops 1e20": "--with = []: joint-moe needs a value for each: --with experts=...",
    "plan --from=moe.json --flops 1e20 --with experts=-8": "--with experts = -8.0: must be a finite number above 0",
    "plan --from=isoflop.json --flops 1e20 --cost 6": "--cost = 6.0: goes with the fit of a law",
    "plan --from=fit.json --flops 1e20 --runs=runs": "--runs = 'runs': goes with --config",
    "plan --from=fit.json --flops 1e20 --out=next.py": "--out = 'next.py': goes with --target",
    "plan --from=fit.json --flops 1e19 1e20 --target 1e21": "--flops = [1e+19, 1e+20]: with --target: one budget",
    "plan --from=fit.json --flops 1e20 --target 1e21 --out=next.yaml": "--out = 'next.yaml': must end in .py",
    "plan --from=fit.json --flops 1e20 --target 0": "--target = 0.0: must be positive FLOPs",
    "plan --from=isoflop.json --flops 1e20 --target 1e21": "needs the fit of one law; isoflop.json is of isoflop",
    "plan --from=shared.json --flops 1e20 --target 1e21": "needs the fit of one law; shared.json is of several arms",
}  # fmt: skip


def test_bad_input_is_one_line_status_2_and_leaves_nothing(folder):
    before = sorted(p.name for p in folder.iterdir())
    for case, (status, out, err) in zip(BAD, ask([c.split() for c in BAD], folder), strict=True):
        assert status == 2, (case, status, out, err)
        assert BAD[case] in err, (case, err)
        assert len(err.strip().splitlines()) == 1, (case, err)
        assert "Traceback" not in err
        assert out == "", case
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_list_names_every_law_with_its_columns(folder):
    (out,) = good(folder, "fit --list")
    for name in (*laws.available(), "isoflop", "envelope"):
        assert re.search(rf"^ *{name} ", out, re.MULTILINE)
    words = " ".join(out.split())
    for said in (
        "E + A / N^alpha",
        "schedule, step, lr → loss",
        "Hoffmann et al. 2022",
        "experts → loss",
    ):
        assert said in words


@pytest.mark.slow
def test_every_law_fits_from_a_file(tmp_path):
    """Each law by name, its columns under other names, some of its parameters fixed; the file is the fit."""
    commands = []
    for name in laws.available():
        law = laws.LAWS[name]()
        table = rows_of(law, 12)
        columns = {c: f"col_{i}" for i, c in enumerate(dict.fromkeys([*law.needs, law.target])) if c != "lr_sum"}
        table.rename(columns=columns).to_csv(tmp_path / f"{name}.csv", index=False)
        command = ["fit", f"{name}.csv", f"--law={name}", "--bootstrap=2", f"--out={name}.json", "--columns"]
        command.append(",".join(f"{role}={column}" for role, column in columns.items()))
        if name not in ("farseer", "ladder", "moe-sparsity"):
            command += [f"--fix={k}={v!r}" for k, v in [*constants_of(law).items()][2:]]
        commands.append(command)
    for name, out in zip(laws.available(), good(tmp_path, *commands), strict=True):
        assert out.startswith(f"{name}: ")
        assert laws.load(tmp_path / f"{name}.json").law.name == name


def test_fit_takes_the_options_of_the_library(folder, tmp_path):
    out = f"{tmp_path}/fit.json"
    options = "--bootstrap=30 --objective=student --delta=0.01 --fix E=1.7 --tie beta=alpha --cluster=none"
    said, at = good(
        folder,
        f"fit both.csv {options} --resample=wild --stratify=family --weights=lr --seed=4 --out={out}",
        "fit old.csv --bootstrap=100 --at 1e20 1e21 --cost=7",
    )
    fit = laws.load(out)
    table = laws.read_table(folder / "both.csv")
    own = laws.fit(
        "chinchilla", table, bootstrap=30, objective="student", delta=0.01, fixed={"E": 1.7}, tied={"beta": "alpha"},
        cluster=None, method="wild", stratify="family", weights="lr", seed=4,
    )  # fmt: skip
    pd.testing.assert_frame_equal(fit.draws, own.draws)
    assert fit.options == own.options
    assert "held fixed: E = 1.7" in said
    best = laws.fit("chinchilla", laws.read_table(folder / "old.csv"), bootstrap=100).optimal([1e20, 1e21], 7.0)
    assert f"{best.loss[1]:.4f} [{best.loss_lower[1]:.4f}, {best.loss_upper[1]:.4f}]" in at
    assert "C = 7 N D; in brackets: 95 % intervals" in at


def test_methods_that_are_no_law(folder, tmp_path):
    out = f"{tmp_path}/isoflop.json"
    isoflop, envelope, _ = good(
        folder,
        f"fit old.csv --law=isoflop --bootstrap=50 --cluster=flops --at 1e20 --out={out}",
        "fit curves.csv --law=envelope --bootstrap=20 --at 1e19",
        "fit curves.csv --law=envelope --bootstrap=20 --cluster=id",
    )
    best = laws.load(out).optimal(1e20)
    assert f"{best.params / 1e9:.3g}B" in isoflop
    assert "D*/N*" in envelope
    assert "loss" not in envelope.splitlines()[-3]  # parabolas and envelopes predict none


def test_a_fit_file_holds_nothing_of_the_budgets_asked_for(folder, tmp_path):
    (said,) = good(folder, f"fit old.csv --bootstrap=20 --at 1e26 --out={tmp_path}/far.json")
    assert "far-extrapolation" in said
    assert "far-extrapolation" not in {n.code for n in laws.load(tmp_path / "far.json").warnings}


def test_compare_says_what_the_library_says(folder, tmp_path):
    arms, by, paired, mixed = good(
        folder,
        f"compare old=old.csv new=new.csv --bootstrap=60 --at 1e19 --out={tmp_path}/m.png --out={tmp_path}/m.json",
        "compare both.csv --by=family --bootstrap=60 --at=1e18:1e20",
        "compare both.csv --by=family --reference=mamba --pair=point --bootstrap=60 --at 1e19 --cost=6",
        "compare a=fit.json b=new.csv --bootstrap=60 --at 1e19",
    )
    found = laws.load(tmp_path / "m.json")
    tables = {name: laws.read_table(folder / f"{name}.csv") for name in ("old", "new")}
    costs = {k: laws.flops_per_token(t.params, t.tokens, t.flops) for k, t in tables.items()}
    own = laws.compare(tables, [1e19], law="chinchilla", bootstrap=60, cost=costs)
    pd.testing.assert_frame_equal(found.contrasts, own.contrasts)
    assert own.summary() in arms
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert by.startswith("mamba against transformer")
    assert len(re.findall(r"^ +1[.\d]*e\+\d\d|^ +[\d.]+e\+\d\d", by, re.MULTILINE)) == 13
    assert paired.startswith("transformer against mamba")
    assert "paired by point (18 matched of 18)" in paired
    assert mixed.startswith("b against a")
    assert "P(within the data)" in arms


def test_plan_from_a_fit(folder, tmp_path):
    best, parabolas, shared, moe, plan = good(
        folder,
        "plan --from=fit.json --flops 1e20 1e21",
        "plan --from=isoflop.json --flops 1e20",
        "plan --from=shared.json --flops 1e20",
        "plan --from=moe.json --flops 1e20 --with experts=8 --cost=6",
        f"plan --from=fit.json --flops 1e20 --target 1e21 --seed=2 --out={tmp_path}/next.py",
    )
    fit = laws.load(folder / "fit.json")
    cost = laws.flops_per_token(*(fit.rows.columns[k] for k in ("params", "tokens", "flops")))
    for row in fit.optimal([1e20, 1e21], cost).itertuples():
        assert f"{row.loss:.4f} [{row.loss_lower:.4f}, {row.loss_upper:.4f}]" in best
    assert best.startswith("chinchilla: compute-optimal")
    assert "C by the table's own FLOPs per token" in best
    assert "D*/N*" in parabolas
    assert {"old: compute-optimal", "new: compute-optimal"} <= {line.strip() for line in shared.splitlines()}
    assert "C = 6 N D" in moe
    assert "recommended: " in plan
    config = (tmp_path / "next.py").read_text(encoding="utf-8")
    assert "RUNS = [" in config
    assert repr(laws.plan(fit, 1e20, 1e21, cost, seed=2).runs()[0]["params"]) in config


def test_runs_of_two_families_are_compared(tmp_path):
    """From run folders, as training leaves them: compare --by family, and the report's own section."""
    for family, truth in (("transformer", TRUTH), ("mamba", BETTER)):
        table = sweep(noise=0.003, truth=truth)
        for i, run in enumerate(table.to_dict("records")):
            known = {k: run[k] for k in ("params", "params_non_embedding", "tokens", "flops", "loss", "loss_se")}
            whole = {k: round(v) for k, v in known.items() if k.startswith("params") or k == "tokens"}
            make(tmp_path / "runs", f"{family}{i:04d}", family=family, **(known | whole))
    compared, told = good(
        tmp_path,
        "compare runs --by=family --bootstrap=40 --out=m.svg",
        "report runs --bootstrap=40 --out=r.html",
    )
    assert compared.startswith("mamba against transformer")
    assert (tmp_path / "m.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert "Against transformer, at each family's optimum" in told
    assert "<h2>Families compared</h2>" in (tmp_path / "r.html").read_text(encoding="utf-8")
