"""Small runs for the tests: a corpus of some kilobytes, a model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import numpy as np

from scalelab import config, data
from scalelab.config import RunSpec

# One process answers many questions: what is asked is whether main() refuses, not whether Python starts.
RUNNER = """
import contextlib, io, json, sys
from scalelab.cli import main
answers = []
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
    answers.append([status, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
"""

TINY: dict[str, Any] = {
    "model.width": 16, "model.layers": 2, "model.attention.heads": 2, "model.attention.kv_heads": 1,
    "model.attention.head_dim": 8, "model.mlp.hidden": 32, "model.compute_dtype": "float32", "model.loss_chunk": 64,
    "model.init": "normal", "model.attention.qk_norm": False,
    "data.seq_len": 16, "data.batch_size": 4, "data.held_out_tokens": 2048, "data.threads": 1,
    "train.steps": 40, "train.eval_every": 0.25, "optim.lr": 1e-2,
}  # fmt: skip


def small_corpus(folder: pathlib.Path, files: int = 100, words: int = 100, seed: int = 0) -> pathlib.Path:
    """A folder of text files with something to learn: few words, each ten to a line."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(seed)
    vocabulary = ["the", "loss", "falls", "as", "a", "power", "of", "compute", "until", "it", "does", "not"]
    for number in range(files):
        lines = [" ".join(rng.choices(vocabulary, k=10)) for _ in range(words // 10)]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_config(corpus: pathlib.Path, **changes: Any):
    source = {"data.sources": {"text": {"kind": "text", "path": str(corpus)}}}
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return config.finish(config.base(), {**TINY, **source, **dotted})


def tiny_spec(corpus: pathlib.Path, **changes: Any) -> RunSpec:
    conf = tiny_config(corpus, **changes)
    return RunSpec(conf, data.fingerprint(conf.data))


def arguments(corpus: pathlib.Path, **changes: Any) -> list[str]:
    """The same run on the command line."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    sources = {"data.sources": {"text": {"kind": "text", "path": str(corpus)}}}
    return ["--config=transformer", *(f"--config.{k}={v}" for k, v in {**TINY, **sources, **dotted}.items())]


def scalelab(*args: str, cwd: pathlib.Path, timeout: float = 120, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scalelab", *args], cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs
    )


def start(*args: str, cwd: pathlib.Path, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scalelab", *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **kwargs,
    )  # fmt: skip


def final_params(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Path -> array of the newest checkpoint's parameters, read as plain arrays."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        params = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(params=ocp.args.StandardRestore())
        ).params
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def assert_same_run(folder: pathlib.Path, reference: pathlib.Path) -> None:
    """Every result column, every step's metrics and the final parameters are equal, bit for bit."""
    from scalelab import records

    assert records.read(folder).results() == records.read(reference).results()
    lines, expected = records.read_metrics(folder), records.read_metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, len(expected) + 1))
    for line, other in zip(lines, expected, strict=True):
        assert {k: v for k, v in line.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    params, wanted = final_params(folder), final_params(reference)
    assert params.keys() == wanted.keys()
    assert all(np.array_equal(params[name], wanted[name]) for name in wanted)
    leftovers = [p.name for p in folder.rglob("*") if ".tmp" in p.name or p.name.startswith((".record", ".metrics"))]
    assert leftovers == []


def last_step(folder: pathlib.Path) -> int:
    try:
        return len((folder / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def environment() -> dict[str, str]:
    """For a process in another folder: the package is found there too."""
    root = str(pathlib.Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def with_devices(count: int) -> dict[str, str]:
    """For a process with so many CPU devices. NPROC sizes XLA's thread pool: a collective holds a thread of each
    device, and two that run at once on as many threads as there are devices wait for each other for ever."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {**environment(), "XLA_FLAGS": flags, "NPROC": str(8 * count)}


def read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def ask(questions: list[list[str]], cwd: pathlib.Path) -> list[tuple[int, str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(questions), cwd=cwd, env=environment(), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout)]
