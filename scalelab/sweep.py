"""Sweeps: a config file's `sweep(arg)` -> RunSpecs; what was kept, what was dropped, and why.

`sweep(arg)` yields mappings of dotted overrides. A value may be a function of the config with everything else already
in place, the overrides from the command line and the tokenizer's vocabulary included: so
`{"train.steps": steps_for(1e15)}` keeps a budget whatever the model became. What such a function or the validation
refuses is dropped with its reason, not run; a sweep that knows better yields `Dropped` itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scalelab import config as configs
from scalelab import data, flops, models, records, start
from scalelab.config import RunSpec
from scalelab.errors import BadInput
from scalelab.paths import make_folder, write_atomically
from scalelab.schema import Config

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run before it is run, with what can be known of it. FLOPs in the exact convention; disk in bytes at its end
    and at its highest."""

    spec: RunSpec
    params: int
    params_non_embedding: int
    steps: int
    tokens: int
    flops: float
    epochs: float | None
    disk: int
    disk_peak: int


@dataclasses.dataclass(frozen=True)
class Dropped:
    overrides: Mapping[str, Any]
    reason: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    name: str
    command: str
    runs: Sequence[PlannedRun]
    dropped: Sequence[Dropped]

    def save(self, root: pathlib.Path) -> pathlib.Path:
        """Writes the specs and `sweeps/<name>.json` below the root; finished runs are left as they are.

        The spec of an unfinished run is written anew: paths and the like, which its id does not know, may differ.
        """
        make_folder(root, "--runs")
        for run in self.runs:
            if records.read(root / run.spec.id) is None:
                write_atomically(root / run.spec.id / "spec.json", run.spec.to_json())
        document = {
            "schema": SCHEMA,
            "name": self.name,
            "command": self.command,
            "ids": [run.spec.id for run in self.runs],
            "dropped": [{"overrides": dict(d.overrides), "reason": d.reason} for d in self.dropped],
        }
        path = root / "sweeps" / f"{self.name}.json"
        write_atomically(path, json.dumps(document, indent=1, default=str) + "\n")
        return path


def expand(reference: str, overrides: Mapping[str, Any], command: str = "", name: str = "") -> Sweep:
    """All runs of a config (one, if the file has no `sweep`). Raises `BadInput` if not one can be run."""
    if name != pathlib.Path(name).name:
        raise BadInput("--name", name, "must be a file's name, without a folder")
    file = configs.load_file(reference)
    base, points = file.get_config(), file.sweep()
    runs: dict[str, PlannedRun] = {}
    dropped: list[Dropped] = []
    corpora = Corpora()
    for point in [{}] if points is None else points:
        if isinstance(point, Dropped):
            dropped.append(point)
            continue
        if not isinstance(point, Mapping):
            raise BadInput("--config", reference, f"its sweep yields {point!r}; must yield {{dotted field: value}}")
        shown = {field: value for field, value in point.items() if not callable(value)}
        try:
            run = plan(_resolve(file, base, point, overrides, corpora), corpora)
        except BadInput as error:
            if points is None:
                raise
            dropped.append(Dropped(shown, str(error)))
            continue
        if run.spec.id in runs:
            dropped.append(Dropped(shown, f"is the same run as {run.spec.id}"))
        runs.setdefault(run.spec.id, run)
    if not runs:
        reasons = {drop.reason: None for drop in dropped}
        why = next(iter(reasons), "it yields nothing")
        raise BadInput("--config", reference, f"no run is left of {len(points or ())}: {why}")
    if not name:
        digest = hashlib.sha256(" ".join(runs).encode()).hexdigest()[:6]
        name = f"{file.path.stem}-{digest}"
    return Sweep(name, command, list(runs.values()), dropped)


def _resolve(
    file: configs.ConfigFile, base: Config, point: Mapping[str, Any], overrides: Mapping[str, Any], corpora: Corpora
) -> Config:
    plain = {field: value for field, value in point.items() if not callable(value)}
    config = configs.override(configs.override(base, plain), overrides)
    for field, value in point.items():
        if callable(value) and field not in overrides:
            configs.validate(config)
            seen = config.copy_and_resolve_references()
            seen.model = models.with_vocabulary(config.model, corpora[config.data].vocab_size)
            config = configs.override(config, {field: file.call(value, seen)})
    return configs.finish(config, {})


class Corpora:
    """Each data section is opened once for all the runs that share it."""

    def __init__(self) -> None:
        self.opened: dict[str, data.Corpus] = {}

    def __getitem__(self, section: Config) -> data.Corpus:
        fields = {k: v for k, v in section.to_dict().items() if k not in ("batch_size", "threads")}
        key = configs.canonical_json(fields)
        if key not in self.opened:
            self.opened[key] = data.open(section)
        return self.opened[key]


def plan(config: Config, corpora: Corpora | None = None) -> PlannedRun:
    """Counts a run without building its model. Raises what training would raise for the same config."""
    corpora = corpora or Corpora()
    corpus = corpora[config.data]
    model = models.with_vocabulary(config.model, corpus.vocab_size)
    counts = flops.counts(model)
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    weights = 4 * counts.total
    keep_at = set(config.checkpoint.keep_at)
    final = {"weights": weights, "all": 3 * weights, "nothing": 0}[config.checkpoint.final]
    final = 0 if config.train.steps in keep_at else final  # counted below
    kept = 3 * weights * len(keep_at)
    metrics = 200 * config.train.steps
    return PlannedRun(
        spec=RunSpec(config, start.content(config, corpus)),
        params=counts.total,
        params_non_embedding=counts.non_embedding,
        steps=config.train.steps,
        tokens=tokens,
        flops=start.flops_per_token(config, model) * tokens,
        epochs=tokens / corpus.unique_tokens if corpus.unique_tokens else None,
        disk=final + kept + metrics,
        # While one checkpoint is being written, the older ones are still there.
        disk_peak=3 * weights * (config.checkpoint.keep_last + 1) + kept + metrics,
    )


# ------------------------------------------------------------------------------------------------ building blocks


def product(**axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every combination; `__` in a name stands for the dot: `product(optim__lr=(1e-3, 2e-3), seed=range(3))`."""
    names = [name.replace("__", ".") for name in axes]
    for values in itertools.product(*axes.values()):
        yield dict(zip(names, values, strict=True))


def steps_for(budget: float, least: int = 20) -> Callable[[Config], int]:
    """Steps that spend a training budget in FLOP (exact convention). Fewer than `least` are refused."""

    def steps(config: Config) -> int:
        step = start.flops_per_token(config, config.model) * config.data.batch_size * config.data.seq_len
        count = round(budget / step)
        if count < least:
            raise BadInput("budget", budget, f"is {budget / step:.1f} steps of {step:.3g} FLOP; needs at least {least}")
        return count

    return steps


# ------------------------------------------------------------------------------------------------ time


class Clock:
    """Estimates seconds per run: from finished runs below the root on this host, else from a short matrix product."""

    # Of the product's rate, a small model's step reached about this much where it was measured (2 CPU cores).
    SHARE = 0.3
    START = 10.0  # s: imports, compilation, evaluation

    def __init__(self, root: pathlib.Path):
        self.rates: list[tuple[float, float]] = []  # (parameters, FLOP/s)
        overheads = []
        for folder in root.glob("*/record.json"):
            record = records.read(folder.parent)
            if record is None or record.host != platform.node() or not record.flops_per_second:
                continue
            self.rates.append((record.params, record.flops_per_second))
            overheads.append((record.seconds or 0.0) - record.flops / record.flops_per_second)
        if self.rates:
            self.overhead = max(0.0, statistics.median(overheads))
            self.source = f"from {len(self.rates)} finished runs on this host"
        else:
            self.overhead = self.START
            self.rates = [(1.0, self.SHARE * _matmul_rate())]
            self.source = f"rough: {self.SHARE:.0%} of this machine's matrix product rate; no finished run to go by"

    def seconds(self, params: float, compute: float) -> float:
        """For a whole run of `compute` FLOP, by the finished run nearest in size."""
        _, rate = min(self.rates, key=lambda pair: abs(math.log(pair[0] / params)))
        return compute / rate + self.overhead


def _matmul_rate(n: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 matrix product, the best of a few."""
    x = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)
