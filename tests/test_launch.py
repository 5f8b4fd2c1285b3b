"""Sweeps on local workers: one process trains run after run, and no run can tell."""

import os
import pathlib
import re
import signal
import threading
import time

import pytest

from scalelab import host, records
from scalelab.launch import local
from scalelab.paths import write_atomically
from scalelab.train import run as train
from tests.helpers import assert_same_run, environment, last_step, small_corpus, tiny_spec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def started(monkeypatch):
    """The workers that a sweep starts."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    processes, start = [], local._start

    def counted(slot, jobs):
        processes.append(start(slot, jobs))
        return processes[-1]

    monkeypatch.setattr(local, "_start", counted)
    return processes


def planned(root: pathlib.Path, specs) -> list[str]:
    for spec in specs:
        write_atomically(root / spec.id / "spec.json", spec.to_json())
    return [spec.id for spec in specs]


def test_one_worker_trains_run_after_run_as_if_each_were_alone(tmp_path, corpus, started):
    specs = [tiny_spec(corpus, train__steps=steps, seed=steps) for steps in (6, 7, 8)]
    ids = planned(tmp_path / "runs", specs)
    assert local.run_all(tmp_path / "runs", ids).done == ids
    assert len(started) == 1
    assert started[0].poll() == 0  # sent home, not killed
    train(specs[-1], tmp_path / "alone")
    assert_same_run(tmp_path / "runs" / ids[-1], tmp_path / "alone" / ids[-1])


@pytest.mark.slow
def test_a_killed_worker_costs_its_run_alone(tmp_path, corpus, started):
    long, short = tiny_spec(corpus, train__steps=5000), tiny_spec(corpus, train__steps=5)
    root = tmp_path / "runs"
    ids = planned(root, [long, short])

    def kill():
        while last_step(root / long.id) < 3:
            time.sleep(0.01)
        os.kill(started[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = local.run_all(root, ids)
    killer.join()
    assert (outcome.done, outcome.failed) == ([short.id], {long.id: "killed by signal 9"})
    assert len(started) == 2


@pytest.mark.slow
def test_a_worker_that_takes_no_second_run_is_replaced(tmp_path, corpus, started, monkeypatch):
    """As on an accelerator, where the peak of memory is that of the process."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("from scalelab import host\nhost.count_memory_anew = lambda: False\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ['PYTHONPATH']}")
    ids = planned(tmp_path / "runs", [tiny_spec(corpus, train__steps=steps) for steps in (5, 6)])
    assert local.run_all(tmp_path / "runs", ids).done == ids
    assert len(started) == 2


def test_each_run_keeps_its_own_log(tmp_path, corpus, started):
    """Its failure is in it too, and in the outcome."""
    specs = [tiny_spec(corpus, train__steps=steps) for steps in (5, 6)]
    root = tmp_path / "runs"
    ids = planned(root, specs)
    (root / ids[1] / "checkpoints").write_text("in the way")
    outcome = local.run_all(root, ids)
    assert outcome.done == ids[:1]
    assert list(outcome.failed) == ids[1:]
    logs = [(root / run / "log.txt").read_text() for run in ids]
    assert "Traceback" not in logs[0]
    assert re.search(r"Traceback[\s\S]*scalelab: failed: .*checkpoints", logs[1])


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_memory_is_that_of_one_run():
    block = bytearray(400 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    high = host.peak_memory()
    del block
    assert host.count_memory_anew()
    assert host.peak_memory() < high - (300 << 20)


def test_a_spec_that_cannot_be_read_is_named(tmp_path, corpus, started):
    spec = tiny_spec(corpus, train__steps=5)
    (run,) = planned(tmp_path / "runs", [spec])
    text = (tmp_path / "runs" / run / "spec.json").read_text()
    write_atomically(tmp_path / "runs" / run / "spec.json", text.replace('"schema": 1', '"schema": 99'))
    outcome = local.run_all(tmp_path / "runs", [run])
    assert "upgrade" in outcome.failed[run]
    assert records.read(tmp_path / "runs" / run) is None
