"""Local workers: one process per run, `jobs` at a time, progress read from the runs' own files."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from scalelab import records
from scalelab.host import stop_signal

STOPPED = 75  # exit status of a run that was asked to stop and can be resumed
POLL = 0.1  # s


@dataclasses.dataclass
class Outcome:
    """Ids by what became of them; failed ones with the reason."""

    done: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    diverged: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    stopped: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Worker:
    run: str
    process: subprocess.Popen[bytes]
    slot: int
    task: TaskID


def _cores(slot: int, jobs: int) -> set[int]:
    """The cores of a slot: an even share, so that workers do not fight, and the same one after a resume."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    start = slot * share % len(cores)
    return set(cores[start : start + share])


def _start(folder: pathlib.Path, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scalelab", "train", "--spec", str(folder / "spec.json"), "--quiet",
               "--parent", str(os.getpid())]  # fmt: skip
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    if jobs > 1 and hasattr(os, "sched_setaffinity"):
        # Set from outside and at once: XLA sizes its thread pool long after, when its backend starts.
        os.sched_setaffinity(process.pid, _cores(slot, jobs))
    return process


def run_all(root: pathlib.Path, ids: Sequence[str], jobs: int = 1, console: Console | None = None) -> Outcome:
    """Runs `root/<id>/spec.json` for every id that has no record yet. One that fails does not stop the rest.

    On SIGTERM or SIGINT the workers are asked to stop, save themselves, and nothing new is started.
    """
    outcome = Outcome()
    waiting = []
    for run in ids:
        if records.read(root / run) is not None:
            outcome.skipped.append(run)
        else:
            waiting.append(run)
    if not waiting:
        return outcome
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    workers: list[_Worker] = []
    free = list(range(jobs))
    with (
        Progress(*columns, console=console or Console(stderr=True), refresh_per_second=4) as progress,
        stop_signal() as stop,
    ):
        overall = progress.add_task("[bold]sweep", total=len(ids), completed=len(outcome.skipped), note="runs")
        asked = False
        try:
            while workers or (waiting and not stop.is_set()):
                while waiting and free and not stop.is_set():
                    run = waiting.pop(0)
                    slot = free.pop(0)
                    steps = json.loads((root / run / "spec.json").read_text(encoding="utf-8"))["config"]["train"][
                        "steps"
                    ]
                    task = progress.add_task(run, total=steps, note="starting")
                    workers.append(_Worker(run, _start(root / run, slot, jobs), slot, task))
                if stop.is_set() and not asked:
                    asked = True  # once: a second signal could end a worker while it saves itself
                    for worker in workers:
                        worker.process.send_signal(signal.SIGTERM)
                time.sleep(POLL)
                for worker in list(workers):
                    line = records.last_metrics(root / worker.run)
                    if line is not None and line["loss"] is not None:
                        progress.update(worker.task, completed=line["step"], note=f"loss {line['loss']:.3f}")
                    status = worker.process.poll()
                    if status is not None:
                        workers.remove(worker)
                        free.append(worker.slot)
                        _settle(outcome, root, worker.run, status)
                        progress.remove_task(worker.task)
                        progress.update(overall, advance=0 if worker.run in outcome.stopped else 1)
        finally:  # an exception of our own must not leave orphans
            for worker in workers:
                worker.process.kill()
        outcome.stopped += waiting
    return outcome


def _settle(outcome: Outcome, root: pathlib.Path, run: str, status: int) -> None:
    record = records.read(root / run)
    if record is not None:
        (outcome.done if record.status == "done" else outcome.diverged).append(run)
    elif status in (STOPPED, -signal.SIGTERM):  # the latter where it had not begun to train yet
        outcome.stopped.append(run)
    else:
        outcome.failed[run] = failure(root / run) or (
            f"killed by signal {-status}"
            if status < 0
            else f"exit status {status}: {_last_line(root / run / 'log.txt')}"
        )


def failure(folder: pathlib.Path) -> str | None:
    """Why the last attempt at a run failed, if it said so."""
    try:
        return json.loads((folder / "failure.json").read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError):
        return None


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
