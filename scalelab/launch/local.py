"""Local workers: `jobs` processes, each given run after run (`worker`), progress read from the runs' own files."""

from __future__ import annotations

import contextlib
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
class _Running:
    run: str
    slot: int
    process: subprocess.Popen[bytes]
    task: TaskID


def _cores(slot: int, jobs: int) -> set[int]:
    """The cores of a slot: an even share, so that workers do not fight, and the same one after a resume."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    start = slot * share % len(cores)
    return set(cores[start : start + share])


def _start(slot: int, jobs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scalelab", "train", "--parent", str(os.getpid())]
    # What it prints goes to its run's log, by its own doing; before the first there is nothing to print but a failure.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
    if jobs > 1 and hasattr(os, "sched_setaffinity"):
        # Set from outside and at once: XLA sizes its thread pool long after, when its backend starts.
        os.sched_setaffinity(process.pid, _cores(slot, jobs))
    return process


def _give(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: seen when it is next looked at
        process.stdin.write(json.dumps(str(folder)).encode() + b"\n")


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
    crew: dict[int, subprocess.Popen[bytes]] = {}  # by slot
    running: list[_Running] = []
    free = list(range(jobs))
    with (
        Progress(*columns, console=console or Console(stderr=True), refresh_per_second=4) as progress,
        stop_signal() as stop,
    ):
        overall = progress.add_task("[bold]sweep", total=len(ids), completed=len(outcome.skipped), note="runs")
        asked = False
        try:
            while running or (waiting and not stop.is_set()):
                while waiting and free and not stop.is_set():
                    run, slot = waiting.pop(0), free.pop(0)
                    if slot in crew and crew[slot].poll() is not None:
                        _dismiss(crew.pop(slot))
                    if slot not in crew:
                        crew[slot] = _start(slot, jobs)
                    _give(crew[slot], root / run)
                    task = progress.add_task(run, total=_steps(root / run), note="starting")
                    running.append(_Running(run, slot, crew[slot], task))
                if stop.is_set() and not asked:
                    asked = True  # once: a second signal could end a worker while it saves itself
                    for process in crew.values():
                        process.send_signal(signal.SIGTERM)
                time.sleep(POLL)
                for item in list(running):
                    line = records.last_metrics(root / item.run)
                    if line is not None and line["loss"] is not None:
                        progress.update(item.task, completed=line["step"], note=f"loss {line['loss']:.3f}")
                    status = item.process.poll()
                    if status is None and not (root / item.run / "record.json").exists():
                        continue
                    running.remove(item)
                    free.append(item.slot)
                    progress.remove_task(item.task)
                    if not _settle(outcome, root, item.run, status):
                        waiting.insert(0, item.run)
                    elif item.run not in outcome.stopped:
                        progress.update(overall, advance=1)
            for process in crew.values():
                _dismiss(process)
        finally:  # an exception of our own must not leave orphans
            for process in crew.values():
                process.kill()
                _dismiss(process)
        outcome.stopped += waiting
    return outcome


def _steps(folder: pathlib.Path) -> int:
    return json.loads((folder / "spec.json").read_text(encoding="utf-8"))["config"]["train"]["steps"]


def _dismiss(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Its last run has a record; it may still be closing files."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)


def _settle(outcome: Outcome, root: pathlib.Path, run: str, status: int | None) -> bool:
    """Whether it is known what became of a run whose record is there or whose worker ended with `status`."""
    record = records.read(root / run)
    if record is not None:
        (outcome.done if record.status == "done" else outcome.diverged).append(run)
    elif not status:  # the worker had ended, its last run done, before it took this one
        return False
    elif status in (STOPPED, -signal.SIGTERM):  # the latter where it had not begun to train yet
        outcome.stopped.append(run)
    else:
        outcome.failed[run] = failure(root / run) or (
            f"killed by signal {-status}"
            if status < 0
            else f"exit status {status}: {_last_line(root / run / 'log.txt')}"
        )
    return True


def failure(folder: pathlib.Path) -> str | None:
    """Why the last attempt at a run failed, if it said so."""
    try:
        return json.loads((folder / "failure.json").read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError):
        return None


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no output"
