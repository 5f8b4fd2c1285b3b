"""Kill -9, SIGTERM and a full disk, with real processes: the same command again gives the same run, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from scalelab import records
from tests.helpers import arguments, assert_same_run, environment, last_step, scalelab, small_corpus, start, tiny_spec

STEPS = {"train__steps": 200, "checkpoint__every": 20}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """(command, folder of the run when it is not interrupted)"""
    folder = tmp_path_factory.mktemp("reference")
    command = ["train", *arguments(corpus, **STEPS)]
    done = scalelab(*command, cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return command, folder / "runs" / tiny_spec(corpus, **STEPS).id


def until(process, condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_at_any_moment(reference, tmp_path):
    """Several kills, at steps drawn afresh each time the test runs and in the middle of a checkpoint being written."""
    command, expected = reference
    folder = tmp_path / "runs" / expected.name
    rng = random.Random()
    moments = sorted(rng.sample(range(1, 199), 3))
    for moment in moments:
        process = start(*command, cwd=tmp_path, env=environment())
        with process:
            until(process, lambda: last_step(folder) >= moment)  # noqa: B023
            process.kill()
        assert records.read(folder) is None, f"killed too late, at {moments}"
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, (moments, done.stderr)
    assert records.read(folder).attempts == 4
    assert_same_run(folder, expected)


def test_kill_while_a_checkpoint_is_written(reference, tmp_path):
    command, expected = reference
    folder = tmp_path / "runs" / expected.name
    with start(*command, cwd=tmp_path, env=environment()) as process:
        # Orbax writes into a temporary folder first; any entry that is not a bare step is one.
        until(process, lambda: any(not p.name.isdigit() for p in (folder / "checkpoints").glob("*")))
        process.kill()
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, expected)


def test_sigterm_saves_exits_75_and_resumes(reference, tmp_path):
    command, expected = reference
    folder = tmp_path / "runs" / expected.name
    with start(*command, cwd=tmp_path, env=environment()) as process:
        until(process, lambda: last_step(folder) >= 31)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the same command resumes it" in stderr
    assert "Traceback" not in stderr
    stopped = last_step(folder)
    assert (folder / "checkpoints" / str(stopped)).is_dir()
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0
    assert f"resumes after step {stopped} of 200" in done.stderr
    assert_same_run(folder, expected)


@pytest.mark.parametrize("limit", [3_000, 12_000])
def test_full_disk(reference, tmp_path, limit):
    """A limit on the size of a file stands for the full disk: some write fails, in the middle of what it writes."""
    command, expected = reference
    folder = tmp_path / "runs" / expected.name

    code = (
        "import resource, sys; from scalelab.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    failed = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "scalelab: failed:" in failed.stderr
    assert records.read(folder) is None
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, expected)


def test_sigterm_before_the_first_step_is_resumable_too(reference, tmp_path):
    command, expected = reference
    folder = tmp_path / "runs" / expected.name
    with start(*command, cwd=tmp_path, env=environment()) as process:
        until(process, lambda: (folder / ".lock").exists())
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert records.read(folder) is None
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, expected)


def test_two_processes_cannot_train_the_same_run(reference, tmp_path):
    command, expected = reference
    folder = tmp_path / "runs" / expected.name
    with start(*command, cwd=tmp_path, env=environment()) as process:
        until(process, lambda: last_step(folder) >= 1)
        os.kill(process.pid, signal.SIGSTOP)
        second = scalelab(*command, cwd=tmp_path, env=environment())
        os.kill(process.pid, signal.SIGCONT)
        process.communicate(timeout=60)
    assert second.returncode == 2
    assert "another process" in second.stderr
    assert process.returncode == 0
    assert_same_run(folder, expected)


def test_a_truncated_checkpoint_costs_steps_not_the_run(reference, tmp_path):
    command, expected = reference
    folder = tmp_path / "runs" / expected.name
    with start(*command, cwd=tmp_path, env=environment()) as process:
        until(process, lambda: last_step(folder) >= 70)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in (newest / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert f"checkpoint of step {newest.name} is damaged" in done.stderr
    assert "falling back to the one before" in done.stderr
    assert_same_run(folder, expected)


@pytest.mark.slow
def test_a_stopped_sweep_exits_75_and_its_runs_resume(corpus, tmp_path):
    command = ["sweep", *arguments(corpus, **STEPS), "--runs=swept"]
    folder = tmp_path / "swept" / tiny_spec(corpus, **STEPS).id
    with start(*command, cwd=tmp_path, env=environment()) as process:
        until(process, lambda: last_step(folder) >= 10)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "1 stopped" in stdout
    assert not records.is_locked(folder)
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert records.read(folder).attempts == 2


def test_a_killed_sweep_leaves_no_worker_behind(corpus, tmp_path):
    """Else the worker would hold its run against the same command, given again."""
    command = ["sweep", *arguments(corpus, **STEPS), "--runs=swept"]
    folder = tmp_path / "swept" / tiny_spec(corpus, **STEPS).id
    with start(*command, cwd=tmp_path, env=environment()) as process:
        until(process, lambda: last_step(folder) >= 10)
        process.kill()
    done = scalelab(*command, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert records.read(folder).attempts == 2
