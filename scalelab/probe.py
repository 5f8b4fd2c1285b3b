"""What an architecture can do: accuracy of trained runs on the tasks of `data.probes`, by length or number of pairs."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from scalelab import data, models, records
from scalelab.config import RunSpec
from scalelab.data import probes
from scalelab.errors import BadInput
from scalelab.evaluate import proportion
from scalelab.host import use_compilation_cache
from scalelab.restore import Opened, load, read_spec

ROWS = 512  # held-out rows of one size
TOKENS = 16384  # of a batch
COLUMNS = ["id", "family", "seed", "task", "size", "accuracy", "accuracy_se"]


def task_of(spec: RunSpec) -> probes.Task:
    """The one probe that a run was trained on."""
    sources = list(spec.config.data.sources.values())
    if len(sources) != 1 or sources[0].kind != "probe":
        raise BadInput("run", spec.id, "was not trained on one probe; `scalelab probe` trains such runs")
    return probes.parse(sources[0].path, "config.data.sources")


def trained_size(spec: RunSpec) -> int:
    """The most that its training rows had."""
    return task_of(spec).longest(spec.config.data.seq_len)


def default_sizes(spec: RunSpec) -> list[int]:
    """Of lengths: half of the longest trained, that, and 2 and 4 times that. Of pairs: from an eighth to all."""
    most, factors = trained_size(spec), (1 / 8, 1 / 4, 1 / 2, 1)
    if not isinstance(task_of(spec), probes.Recall):
        factors = (1 / 2, 1, 2, 4)
    return sorted({max(1, round(most * factor)) for factor in factors})


def check_sizes(spec: RunSpec, sizes: Sequence[int]) -> None:
    """Raises `BadInput` for a size that the task does not have, before anything is trained."""
    for size in sizes:
        source(spec, size).held_out(1)


def source(spec: RunSpec, size: int) -> probes.Probe:
    """Rows of one size, of the task that a run was trained on."""
    asked, length = task_of(spec).at(size, spec.config.data.seq_len)
    if wrong := asked.wrong(length):
        raise BadInput("size", size, wrong)
    return probes.Probe(probes.spec(asked), length, "size")


def table(folders: Sequence[pathlib.Path], sizes: Sequence[int]) -> pd.DataFrame:
    """`score` of several runs; those of another seed share the compiled programs."""
    use_compilation_cache()
    return pd.concat([score(folder, sizes) for folder in folders], ignore_index=True)


def score(folder: pathlib.Path, sizes: Sequence[int], rows: int = ROWS) -> pd.DataFrame:
    """One row for each size: accuracy of a finished run, with its standard error. It enters the record, as
    `eval.TASK@SIZE.accuracy`; what is there already is not computed again."""
    record = records.read(folder)
    if record is None:
        raise BadInput("run", str(folder), "has no record (not finished yet)")
    if record.status == "diverged":
        raise BadInput("run", str(folder), f"has diverged: {record.reason}")
    spec = read_spec(folder)
    task = probes.spec(task_of(spec)).partition(",")[0]
    known, new, opened = record.evaluations or {}, {}, None
    table = []
    for size in sizes:
        rows_of = source(spec, size)
        name = f"{task}@{size}"
        entry = {"content": rows_of.content, "seq_len": rows_of.seq_len, "rows": rows}
        if not entry.items() <= known.get(name, {}).items():
            opened = opened or load(folder)
            right, of = answers(opened, rows_of.held_out(rows * rows_of.seq_len), alone=rows_of.task.alone)
            value, error = proportion(right, of)
            new[name] = entry | {"accuracy": value, "accuracy_se": error, "answers": int(of.sum())}
        found = new.get(name) or known[name]
        table.append([record.id, record.family, record.seed, task, size, found["accuracy"],
                      found["accuracy_se"]])  # fmt: skip
    if new:
        records.add_evaluations(folder, new)
    return pd.DataFrame(table, columns=COLUMNS)


def answers(run: Opened, held: data.HeldOut, alone: bool) -> tuple[np.ndarray, np.ndarray]:
    """(right answers, answers) of each row, by the likeliest token; `alone`: its last answer only."""
    graphdef, _ = models.abstract(run.model)

    @jax.jit
    def likeliest(params: Any, tokens: jax.Array) -> jax.Array:
        segments = jnp.cumsum(tokens == run.tokenizer.bos, axis=1) if run.spec.config.data.document_mask else None
        logits = models.merge(graphdef, params)(tokens, segments)
        return jnp.argmax(logits[..., : run.tokenizer.vocab_size], axis=-1)

    tokens, labels = data.split_rows(held.tokens)
    n, T = tokens.shape
    at_once = max(1, min(n, TOKENS // T))
    said = []
    for start in range(0, n, at_once):
        rows = tokens[start : start + at_once]
        padded = np.concatenate([rows, np.repeat(rows[-1:], at_once - len(rows), axis=0)])  # one shape, one compilation
        said.append(np.asarray(likeliest(run.params, padded))[: len(rows)])
    asked = labels >= 0
    if alone:
        asked &= np.cumsum(asked[:, ::-1], axis=1)[:, ::-1] == 1
    return ((np.concatenate(said) == labels) & asked).sum(1), asked.sum(1)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By family and size: mean, and `low` to `high`: of one seed the 95 % interval, of several the range over seeds."""
    groups: Any = table.groupby(["family", "size"], sort=False)
    rows = []
    for (family, size), group in groups:
        accuracy, error = (group[name].to_numpy() for name in ("accuracy", "accuracy_se"))
        mean, low, high = accuracy.mean(), accuracy.min(), accuracy.max()
        if len(group) == 1:
            low, high = max(0.0, mean - 1.96 * error[0]), min(1.0, mean + 1.96 * error[0])
        rows.append([family, size, len(group), float(mean), float(low), float(high)])
    return pd.DataFrame(rows, columns=["family", "size", "seeds", "accuracy", "low", "high"])
