"""The command line, with real processes: exit status, one clear line, nothing half-written."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from scalelab import records
from scalelab.paths import write_atomically
from tests.helpers import TINY, arguments, ask, environment, read_json, scalelab, small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def test_bad_input_is_one_line_status_2_and_leaves_nothing(tmp_path, corpus):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1") * 1000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("params,tokens\n1,2\n")
    (tmp_path / "broken.py").write_text("def get_config(arg):\n    return 3\n")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text('{"schema": 1}')
    (tmp_path / "spec.json").write_text('{"schema": 1, "config": 3, "content": {}}')
    steps = {"config": {"train": {"steps": -4}, "data": {"sources": {"a": {"kind": "text", "path": str(corpus)}}}}}
    (tmp_path / "steps.json").write_text(json.dumps({"schema": 1, "content": {}} | steps))
    sweep = "from scalelab.config import base\ndef get_config(arg=''): return base().lock()\ndef sweep(arg=''): yield "
    for name, point in {
        "list": "['train.steps']",
        "call": "{'train.steps': lambda config: config.nothing}",
        "inf": "{'train.steps': float('inf')}",
    }.items():
        (tmp_path / f"{name}.py").write_text(sweep + point)
    before = sorted(p.name for p in tmp_path.iterdir())
    cases = {
        "train --config=nothing": "no built-in config of that name",
        "train --config=transformer:sise=s": "did you mean size",
        "train --config=transformer:size=huge": "must be one of xs, s, m, l, 165m",
        "train --config=transformer:steps=many": "must be a whole number",
        "train --config=broken.py": "must return an ml_collections.ConfigDict",
        "train --config=transformer --config.model.widht=3": "did you mean width",
        "train --config=transformer --config.model.width=wide": "config.model.width = 'wide': must be a whole number",
        "train --config=transformer --config.model.width": "needs a value",
        "train --config=transformer --config.model.attention.kv_heads=3": "must divide",
        "train --config=transformer --config.model.width=0": "config.model.width = 0",
        "train --config=transformer --config.data.batch_size=0": "config.data.batch_size = 0: must be at least 1",
        "train --config=transformer --config.model.blocks=(('attnetion','mlp'),)": "attnetion",
        "train --config=transformer:data=/nowhere": "'/nowhere': no such file",
        "train --config=transformer:data=latin1.txt": "latin1.txt",
        "train --config=transformer:data=empty": "empty",
        "train --config=transformer --config.data.tokenizer=nowhere.json": "nowhere.json",
        "train": "needs either --config or --spec",
        "train --spec=nowhere.json": "cannot be read",
        "train --spec=spec.json": "is not a run's spec",
        "train --spec=steps.json": "config.train.steps = -4: must be at least 1",
        "train --spec=steps.json --runs=elsewhere": "--runs = 'elsewhere': goes with --config",
        f"train --config=transformer:data={corpus},steps=1 --runs=file": "--runs = 'file/",
        f"sweep --config=transformer:data={corpus},steps=1 --runs=file": "--runs = 'file': cannot be made a folder",
        "sweep --config=transformer --name=../x": "--name = '../x': must be a file's name",
        f"plan --config=transformer:data={corpus} --config.model.vocab_size=100": "the tokenizer has 257 tokens",
        "plan --config=transformer:params=1e15": "the largest transformer of the recipe",
        "plan --config=transformer:parametrization=mup,base=7": "width = 7: must be a multiple of 8, at least 8",
        "plan --config=transformer:parametrization=mup,base=0": "width = 0: must be a multiple of 8, at least 8",
        "plan --config=transformer:parametrization=no": "error: argument parametrization = 'no': must be one of",
        "plan --config=transformer:base=64": "config argument base = 64: needs parametrization = mup or completep",
        "plan --config=transformer:params=1e6,size=s": "config argument size = 's': goes without params = 1e+06",
        "plan --config=lr_transfer:widths=0:32": "width = 0: must be a multiple of 8, at least 8",
        "plan --config=hybrid:mixer=nope": "error: argument mixer = 'nope': must be one of transformer",
        "plan --config=hybrid:mixer=mor": "error: argument mixer = 'mor': must be one of transformer",
        "plan --config=hybrid:every=0": "error: argument every = 0: must be at least 1",
        "plan --config=transformer:data=shards": "manifest.json that can't be read",
        "plan --config=transformer --config.data.sources={'a':3}": "config.data.sources.a = 3: must be a mapping",
        "plan --config=list.py": "must yield {dotted field: value}",
        "plan --config=call.py": "does not run: line 3: AttributeError",
        "plan --config=inf.py": "config.train.steps = inf: must be of type int",
        "plan --config=isoflop:budgets=-1e12": "config argument budgets = -1000000000000.0: must be above 0",
        "plan --config=isoflop:ratio=0": "config argument ratio = 0.0: must be above 0",
        "plan --config=isoflop:sizes=0": "config argument sizes = 0: must be at least 1",
        "plan --config=isoflop:span=0": "config argument span = 0.0: must be at least 1",
        "bench step --pairs=2": "--pairs = 2: must be at least 3",
        "bench families --params=nan": "argument params = nan: must be finite and above 0",
        "bench families --params=0": "argument params = 0.0: must be above 0",
        "bench train --params=nan": "argument params = nan: must be finite and above 0",
        "train --config=transformer --fast": "not an option here",
        "plan --config=isoflop:budgets=1e5": "too small",
        "plan --config=isoflop:budgets=much": "must be a finite number",
        "sweep --config=isoflop --jobs=0": "--jobs = 0: must be at least 1",
        "sweep --config=isoflop --jobs=two": "invalid int value",
        "fit nowhere.csv": "no such file",
        "fit table.csv": "needs a column loss",
        "fit table.csv --law=kepler": "must be one of",
        "fit table.csv --columns=params": "must be ROLE=NAME",
        "fit empty": "holds no runs",
        "report empty": "holds no runs",
        "status nowhere": "holds no runs",
        "sample nowhere": "is no run's folder",
        "data build nowhere --out=shards": "no such file",
        "plan --config=transformer:data=probe:partiy": "must begin with one of parity, modular",
        "plan --config=transformer:data=probe:parity --config.data.seq_len=1": "needs a sequence length of at least 2",
        "plan --config=probe:task=recall,size=0,families=lstm": "config argument families = 'lstm': must be of",
        "probe --task=partiy": "config argument task = 'partiy': must be one of parity",
        "probe --families=lstm": "config argument families = 'lstm': must be of",
        "probe --lengths=0": "--lengths = '0': must be at least 1 each",
        "probe --pairs=0": "--pairs = '0': must be at least 1 each",
        "probe --pairs=2 --lengths=2": "not allowed with argument",
        "probe --lengths=2": "too few different rows",
        "probe --jobs=0": "--jobs = 0: must be at least 1",
        "probe --out=nowhere/p.png": "its folder does not exist",
        "eval nowhere": "holds no runs",
        "eval empty --context=many": "--context = 'many': must be whole numbers",
        "eval empty --tasks=nowhere.jsonl": "holds no runs",
        "eval": "the following arguments are required: run",
        "frobnicate": "invalid choice",
    }
    answers = ask([case.split() for case in cases], tmp_path)
    for (case, says), (status, out, err) in zip(cases.items(), answers, strict=True):
        assert status == 2, (case, status, out, err)
        assert says in err, (case, err)
        assert len(err.strip().splitlines()) == 1, (case, err)
        assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_sweep_from_plan_to_report(tmp_path, corpus):
    """plan, sweep, status, fit, report and sample, in an empty folder; a second sweep trains nothing."""
    (tmp_path / "lr.py").write_text(
        "from scalelab import config, sweep as sweeps\n"
        f"def get_config(arg=''):\n    return config.override(config.base(), {TINY!r}).lock()\n"
        "def sweep(arg=''):\n"
        "    yield from sweeps.product(optim__lr=(1e-2, 1e30), seed=(0,))\n"
        "    yield {'model.attention.kv_heads': 3}\n"
        "    yield {'optim.lr': 1e-2}\n"
    )
    source = f"--config.data.sources={{'text': {{'kind': 'text', 'path': '{corpus}'}}}}"
    command = ["--config=lr.py", source, "--config.train.steps=12", "--config.optim.clip=0"]
    plan = scalelab("plan", *command, cwd=tmp_path, env=environment())
    assert plan.returncode == 0, plan.stderr
    assert "2 runs" in plan.stdout
    assert "config.model.attention.kv_heads = 3" in plan.stdout
    assert "is the same run as" in plan.stdout
    assert not (tmp_path / "runs").exists()

    sweep = scalelab("sweep", *command, "--jobs=2", cwd=tmp_path, env=environment())
    assert sweep.returncode == 0, sweep.stderr
    assert "1 trained, 1 diverged" in sweep.stdout
    path = pathlib.Path(sweep.stdout.strip().splitlines()[-1])
    assert len(read_json(tmp_path / path)["ids"]) == 2
    assert sorted(records.load(tmp_path / path)["status"]) == ["diverged", "done"]

    again = scalelab("sweep", *command, cwd=tmp_path, env=environment())
    assert "2 finished before" in again.stdout
    status = scalelab("status", str(path), cwd=tmp_path, env=environment())
    assert "1 diverged" in status.stdout
    assert "1 done" in status.stdout
    run = records.load(tmp_path / path).query("status == 'done'")["id"].item()
    sample = scalelab("sample", f"runs/{run}", "--prompt=the loss", "--tokens=20", cwd=tmp_path, env=environment())
    assert sample.stdout.startswith("the loss")
    assert len(sample.stdout) > len("the loss") + 1


@pytest.mark.slow
def test_one_failing_run_does_not_stop_the_rest(tmp_path, corpus):
    from tests.helpers import tiny_spec

    good, bad = tiny_spec(corpus, train__steps=6), tiny_spec(corpus, train__steps=7)
    for spec in (good, bad):
        write_atomically(tmp_path / "runs" / spec.id / "spec.json", spec.to_json())
    # A file where the run's checkpoints should be: this one cannot work.
    (tmp_path / "runs" / bad.id / "checkpoints").write_text("in the way")
    from scalelab.launch import local

    outcome = local.run_all(tmp_path / "runs", [bad.id, good.id, "ffffffffffff"][:2])
    assert outcome.done == [good.id]
    assert list(outcome.failed) == [bad.id]
    assert "checkpoints" in outcome.failed[bad.id]
    status = scalelab("status", cwd=tmp_path, env=environment())
    assert "1 failed" in status.stdout
    assert re.search(rf"{bad.id}\s+failed", status.stdout)
    sweep = scalelab("sweep", *arguments(corpus, train__steps=7), cwd=tmp_path, env=environment())
    assert sweep.returncode == 1
    assert "1 failed" in sweep.stdout
    (tmp_path / "runs" / bad.id / "checkpoints").unlink()
    assert local.run_all(tmp_path / "runs", [bad.id, good.id]).done == [bad.id]


def test_status_of_a_run_whose_data_have_gone(tmp_path, corpus):
    """It says so, and what the other runs do; the data are opened once, not for each run."""
    from tests.helpers import tiny_spec
    from tests.test_records import make as make_record

    moved = shutil.copytree(corpus, tmp_path / "corpus")
    lost, kept, other = (tiny_spec(moved, seed=1), tiny_spec(corpus), tiny_spec(corpus, seed=2))
    for spec in (lost, kept, other):
        write_atomically(tmp_path / "runs" / spec.id / "spec.json", spec.to_json())
    shutil.rmtree(moved)
    make_record(tmp_path / "runs", "finished", flops=1e6, seconds=2.0, flops_per_second=1e6)
    code = (
        "import pathlib\nfrom scalelab import data, tables\ncalls, opened = [], data.open\n"
        "data.open = lambda section: calls.append(section) or opened(section)\n"
        "tables.status(pathlib.Path('runs'))\nprint('opened', len(calls))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nosuchfile" in "".join(done.stdout.split())  # the note is wrapped
    assert re.search(rf"{lost.id}\s+missing\s+-", done.stdout)
    assert re.search(rf"{kept.id}\s+missing\s+\d", done.stdout)
    assert re.search(r"3 missing.*; about \d.* of training left", done.stdout)
    assert "opened 2" in done.stdout


def test_train_prints_the_result_and_takes_a_spec(tmp_path, corpus):
    done = scalelab("train", *arguments(corpus, train__steps=5), cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.search(r"held-out loss \d\.\d{4} ± 0\.\d{4} nats per token", done.stdout)
    spec = next((tmp_path / "runs").glob("*/spec.json"))
    again = scalelab("train", f"--spec={spec}", cwd=tmp_path, env=environment())
    assert again.returncode == 0
    assert again.stdout.splitlines()[0] == done.stdout.splitlines()[0]


def test_a_reader_that_leaves_early_is_no_failure(tmp_path, corpus):
    command = [sys.executable, "-m", "scalelab", "plan", *arguments(corpus)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_sigterm_cannot_be_swallowed():
    """Python only prints what a destructor raises, and goes on."""
    code = (
        "import os, signal\nfrom scalelab import cli\n"
        "class A:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli._stoppable()\nA()\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.splitlines() == ["scalelab: stopped outside of training; the same command resumes it"]


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import scalelab", ("jax", "numpy", "pandas")),
        ("import scalelab.laws", ("jax", "flax", "matplotlib", "scipy.optimize")),
        ("import scalelab.cli; scalelab.cli.flags.parser()", ("jax", "pandas", "rich")),
    ],
)
def test_imports_stay_light(code, without):
    check = f"{code}\nimport sys\nprint([name for name in {without!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_names_every_command():
    done = scalelab("--help", cwd=pathlib.Path.cwd())
    assert done.returncode == 0
    for name in ("plan", "train", "sweep", "status", "fit", "compare", "report", "sample", "data", "bench"):
        assert re.search(rf"^\s+{name}\s", done.stdout, re.MULTILINE)
