"""Sinks for a run's metrics: `metrics.jsonl` is the truth; the others may fail without hurting a run."""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scalelab import records
from scalelab.config import RunSpec
from scalelab.paths import write_atomically


def say(message: str) -> None:
    """One line to the person (or log) behind stderr."""
    print(f"scalelab: {message}", file=sys.stderr, flush=True)


class Sink(Protocol):
    def write(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one line per step, in order, each step once, whatever happened in between."""

    def __init__(self, folder: pathlib.Path, keep: list[dict[str, Any]]):
        """Starts anew from the lines to keep: what came after the restored step, or half a line, goes."""
        self.path = folder / "metrics.jsonl"
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in keep)
        write_atomically(self.path, text)
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(records.finite(line), allow_nan=False) + "\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk has already been said where the line was written
            self.file.close()


class ProgressBar:
    """Steps, loss, time left. Silent where stderr is no terminal."""

    def __init__(self, steps: int, title: str):
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=steps, loss="")
        self.held_out = ""
        self.progress.start()

    def write(self, line: Mapping[str, Any]) -> None:
        if "held_out" in line:
            self.held_out = f", held-out {line['held_out']['loss']:.3f}"
        self.progress.update(self.task, completed=line["step"], loss=f"loss {line['loss']:.3f}{self.held_out}")

    def close(self) -> None:
        self.progress.stop()


class Guarded:
    """A sink whose failure is said once and then no longer tried."""

    def __init__(self, name: str, make: Any):
        self.name = name
        self.sink: Any = None
        self._try(lambda: setattr(self, "sink", make()))

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            say(f"{self.name} failed and is left out from here on ({type(error).__name__}: {error})")
            self.sink = None

    def write(self, line: Mapping[str, Any]) -> None:
        if (sink := self.sink) is not None:
            self._try(lambda: sink.write(line))

    def close(self) -> None:
        if self.sink is not None:
            self._try(self.sink.close)


class Wandb:
    """Weights & Biases; `mode` is online or offline. Resumes the run of the same id."""

    def __init__(self, spec: RunSpec, folder: pathlib.Path, mode: str):
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project="scalelab", id=spec.id, name=spec.id, resume="allow", mode=mode, dir=str(folder),
            config=spec.config.to_dict(),
        )  # fmt: skip

    def write(self, line: Mapping[str, Any]) -> None:
        self.run.log(_scalars(line), step=line["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    def __init__(self, folder: pathlib.Path):
        self.writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    flat = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": v for inner, v in _scalars(value).items()})
        elif isinstance(value, int | float) and name != "step":
            flat[name] = value
    return flat


def optional_sinks(spec: RunSpec, folder: pathlib.Path) -> list[Sink]:
    log = spec.config.log
    sinks: list[Sink] = []
    if log.wandb:
        sinks.append(Guarded("wandb", lambda: Wandb(spec, folder, log.wandb)))
    if log.tensorboard:
        sinks.append(Guarded("TensorBoard", lambda: TensorBoard(folder)))
    return sinks
