"""The loop's overhead: steps per second of `train.run`'s loop as a share of the bare jitted step's.

    scalelab bench step

Both do the same steps on the same shapes. The bare step gets one batch that is already on the device and is only
waited for at the end; the loop reads its data, writes its metrics and looks for divergence and signals. Evaluation
and checkpoints are apart (none happen), compilation too. Pairs are interleaved, their order alternates, and the
median of the ratios is reported with its interquartile range.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from scalelab import config, data, sharding, train
from scalelab.checkpoint import Checkpoints
from scalelab.track import MetricsFile


def main(pairs: int = 9, steps: int = 100) -> int:
    console = Console(stderr=True)
    conf = config.load(
        "transformer:size=s,dtype=float32",
        {"data.seq_len": 64, "data.batch_size": 8, "train.steps": steps, "train.eval_every": 0.0,
         "checkpoint.final": "nothing", "data.held_out_tokens": 4096},
    )  # fmt: skip
    corpus = data.open(conf.data)
    trainer = train.Trainer(conf, corpus)
    loops, bares = [], []
    with tempfile.TemporaryDirectory() as folder:
        one_loop(conf, corpus, trainer, pathlib.Path(folder))  # compiles
        for pair in track(range(pairs), "pairs", console=console, transient=True):
            for kind in ("loop", "bare") if pair % 2 else ("bare", "loop"):
                if kind == "loop":
                    loops.append(one_loop(conf, corpus, trainer, pathlib.Path(folder)) / steps)
                else:
                    bares.append(one_bare(conf, corpus, trainer, steps) / steps)
    ratios = [bare / loop for bare, loop in zip(bares, loops, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    device = jax.devices()[0].device_kind
    print(
        f"step: bare {1e3 * statistics.median(bares):.2f} ms, loop {1e3 * statistics.median(loops):.2f} ms, "
        f"{1 / statistics.median(loops):.1f} steps/s; the loop runs at {middle:.1%} of the bare step's rate "
        f"(quartiles {low:.1%} to {high:.1%}; median of {pairs} interleaved pairs of {steps} steps, {device})"
    )
    return 0


def one_bare(conf, corpus: data.Corpus, trainer: train.Trainer, steps: int) -> float:
    state = trainer.initial_state()
    rows = sharding.put_rows(next(corpus.stream(conf.data_seed, 0)), trainer.mesh)
    jax.block_until_ready((state, rows))
    rate = np.float32(conf.optim.lr)
    began = time.perf_counter()
    for _ in range(steps):
        state, _ = trainer.step(state, rows, rate)
    jax.block_until_ready(state)
    return time.perf_counter() - began


def one_loop(conf, corpus: data.Corpus, trainer: train.Trainer, folder: pathlib.Path) -> float:
    spec = config.RunSpec(conf, corpus.content)
    attempt = train.Attempt(spec, folder, corpus, trainer)
    attempt.checkpoints = Checkpoints(folder / "checkpoints")
    attempt.metrics = MetricsFile(folder, [])
    attempt.sinks = [attempt.metrics]
    attempt.evaluate = lambda params: {"loss": 0.0}  # measured apart  # pyright: ignore[reportAttributeAccessIssue]
    attempt.seconds_before = 0.0
    state = jax.block_until_ready(trainer.initial_state())
    began = time.perf_counter()
    attempt.loop(state, 0)
    took = time.perf_counter() - began
    attempt.metrics.close()
    attempt.checkpoints.close()
    return took
