"""The loop's overhead: steps per second of `train.run`'s loop as a share of the bare jitted step's.

    scalelab bench step

Both do the same steps on the same shapes. The bare step gets one batch that is already on the device; the loop reads
its data, writes its metrics and looks for divergence and signals. Evaluation, checkpoints and compilation are apart.
One loop runs from end to end and stands still after every few steps, while the bare step runs as many: each pair lasts
a fraction of a second, so that a machine whose speed drifts slows both alike. A loop's segment is compared with the
mean of the bare ones on either side of it; the median of these ratios is reported with its 95 % interval.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from scalelab import config, data, sharding, train, update
from scalelab.checkpoint import Checkpoints
from scalelab.errors import BadInput
from scalelab.track import MetricsFile

LENGTH = 5  # steps of a segment


def main(pairs: int = 300) -> int:
    if pairs < 3:
        raise BadInput("--pairs", pairs, "must be at least 3, for an interval")
    conf = config.load(
        "transformer:size=s,dtype=float32",
        {"data.seq_len": 64, "data.batch_size": 8, "train.steps": (pairs + 1) * LENGTH, "train.eval_every": 0.0,
         "checkpoint.final": "nothing", "data.held_out_tokens": 4096},
    )  # fmt: skip
    corpus = data.open(conf.data)
    trainer = update.Trainer(conf, corpus)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        clock = Clock(corpus, trainer, bar.add_task("pairs", total=pairs), bar)
        with tempfile.TemporaryDirectory() as folder:
            run_loop(conf, clock, trainer, pathlib.Path(folder))
    bare, loop = np.array(clock.bare[1:]), np.array(clock.loop[1:])  # the first segments compile
    ratios = 0.5 * (bare[:-1] + bare[1:])[: len(loop)] / loop[: len(bare) - 1]
    draws = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(
        f"step: bare {1e3 * np.median(bare):.2f} ms, loop {1e3 * np.median(loop):.2f} ms, {1 / np.median(loop):.1f} "
        f"steps/s; the loop runs at {np.median(ratios):.1%} of the bare step's rate (95 % interval {low:.1%} to "
        f"{high:.1%}; median of {len(ratios)} interleaved pairs of {LENGTH} steps, {jax.devices()[0].device_kind})"
    )
    return 0


class Clock:
    """Stands in for the corpus: between two segments of the loop its stream lets the bare step run."""

    def __init__(self, corpus: data.Corpus, trainer: update.Trainer, task: Any, bar: Progress):
        self.corpus, self.task, self.bar = corpus, task, bar
        self.bare: list[float] = []  # seconds per step of each segment
        self.loop: list[float] = []
        self.step: Any = trainer.step
        trainer.step = self._watched  # pyright: ignore[reportAttributeAccessIssue]
        self.state = trainer.initial_state()
        self.rows = sharding.put_rows(next(corpus.stream(1, 0)), trainer.mesh)
        self.last: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.corpus, name)

    def _watched(self, *args: Any) -> Any:
        state, self.last = self.step(*args)
        return state, self.last

    def stream(self, seed: int, start: int) -> Generator[np.ndarray, None, None]:
        batches = self.corpus.stream(seed, start)
        try:
            while True:
                self._run_bare()
                began = time.perf_counter()
                for _ in range(LENGTH):
                    yield next(batches)
                jax.block_until_ready(self.last)
                self.loop.append((time.perf_counter() - began) / LENGTH)
                self.bar.advance(self.task)
        finally:
            batches.close()

    def _run_bare(self) -> None:
        began = time.perf_counter()
        for _ in range(LENGTH):
            self.state, metrics = self.step(self.state, self.rows, np.float32(1e-3))
        jax.block_until_ready(metrics)
        self.bare.append((time.perf_counter() - began) / LENGTH)


def run_loop(conf: Any, corpus: Any, trainer: update.Trainer, folder: pathlib.Path) -> None:
    attempt = train.Attempt(config.RunSpec(conf, corpus.content), folder, corpus, trainer)
    attempt.checkpoints = Checkpoints(folder / "checkpoints")
    attempt.metrics = MetricsFile(folder, [])
    attempt.sinks = [attempt.metrics]
    attempt.evaluate = lambda params: {"loss": 0.0}  # measured apart  # pyright: ignore[reportAttributeAccessIssue]
    attempt.seconds_before = 0.0
    attempt.loop(trainer.initial_state(), 0)
    attempt.metrics.close()
    attempt.checkpoints.close()
