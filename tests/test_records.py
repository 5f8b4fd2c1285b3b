import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from scalelab import records
from scalelab.errors import BadInput
from scalelab.paths import write_atomically
from scalelab.records import RunRecord

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def make(root: pathlib.Path, run: str, **changes) -> RunRecord:
    document = json.loads((FIXTURES / "record_schema1.json").read_text()) | {"id": run} | changes
    record = RunRecord.from_json(json.dumps(document))
    write_atomically(root / run / "spec.json", "{}")
    write_atomically(root / run / "record.json", record.to_json())
    return record


def test_records_of_schema_1_still_load():
    record = RunRecord.from_json((FIXTURES / "record_schema1.json").read_text())
    assert record.status == "done"
    assert record.loss == pytest.approx(2.1)
    assert RunRecord.from_json(record.to_json()) == record


def test_a_record_from_the_future_and_a_damaged_one():
    with pytest.raises(BadInput, match="upgrade"):
        RunRecord.from_json('{"schema": 99}')
    with pytest.raises(BadInput, match="is not a run's record"):
        RunRecord.from_json('{"id": "a"', "runs/a/record.json")


def test_load_takes_a_run_a_sweep_or_a_root(tmp_path):
    for run, loss in (("a", 2.0), ("b", 3.0)):
        make(tmp_path, run, loss=loss)
    make(tmp_path, "c", loss=None, status="diverged", reason="loss nan at step 3")
    write_atomically(tmp_path / "d" / "spec.json", "{}")  # not finished
    write_atomically(tmp_path / "sweeps" / "s.json", json.dumps({"ids": ["b", "d", "nowhere"]}))
    table = records.load(tmp_path)
    assert list(table["id"]) == ["a", "b", "c"]
    assert table["loss"].dtype == "float64"
    assert table.loc[2, "status"] == "diverged"
    assert list(records.load(tmp_path / "a")["loss"]) == [2.0]
    assert list(records.load(tmp_path / "sweeps" / "s.json")["id"]) == ["b"]
    with pytest.raises(BadInput, match="holds no runs"):
        records.load(tmp_path / "empty")


def test_curves_hold_every_evaluation(tmp_path):
    make(tmp_path, "a", steps=10, tokens=1000, batch_tokens=100, flops=5e6)
    lines = [{"step": s, "loss": 3.0, "seconds": 1.0} for s in range(1, 11)]
    for s in (5, 10):
        lines[s - 1]["held_out"] = {"loss": 3.0 - s / 10, "loss_se": 0.1, "bpb": 4.0, "bpb_se": 0.1}
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = records.curves(tmp_path)
    assert list(curves["step"]) == [5, 10]
    assert list(curves["tokens"]) == [500, 1000]
    assert list(curves["flops"]) == [2.5e6, 5e6]
    assert list(curves["loss"]) == [2.5, 2.0]


def test_curves_are_numbers_also_where_no_run_has_a_standard_error(tmp_path):
    make(tmp_path, "a", steps=1)
    line = {"step": 1, "held_out": {"loss": 3.0, "loss_se": None, "bpb": 4.0}}
    (tmp_path / "a" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert records.curves(tmp_path)["loss_se"].dtype == "float64"


def test_half_a_line_is_no_line(tmp_path):
    whole = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    for tail in ('{"step": 3, "lo', '{"step": 3}', "garbage\n"):
        (tmp_path / "metrics.jsonl").write_text(whole + tail)
        assert [line["step"] for line in records.read_metrics(tmp_path)] == [1, 2]
        assert records.last_metrics(tmp_path)["step"] == 2
    assert records.read_metrics(tmp_path / "nowhere") == []
    assert records.last_metrics(tmp_path / "nowhere") is None


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_lock_is_held_across_processes_and_dropped_with_the_process(tmp_path):
    code = (
        "import pathlib, time\nfrom scalelab import records\n"
        f"with records.run_lock(pathlib.Path({str(tmp_path / 'a')!r})):\n"
        "    print('locked', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        assert records.is_locked(tmp_path / "a")
        with pytest.raises(BadInput, match="another process"), records.run_lock(tmp_path / "a"):
            pass
        process.kill()
        process.wait()
    assert not records.is_locked(tmp_path / "a")
    assert not records.is_locked(tmp_path / "nowhere")


def test_a_look_at_the_lock_stops_nobody_and_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    assert not records.is_locked(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []
    with open(tmp_path / "a" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        release = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        with records.run_lock(tmp_path / "a"):
            assert records.is_locked(tmp_path / "a")
        release.join()


def test_every_field_says_whether_a_rerun_would_change_it():
    import dataclasses

    measured = {f.name for f in dataclasses.fields(RunRecord) if f.metadata["measured"]}
    assert measured == {
        "seconds", "step_seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_memory", "device", "host",
        "attempts", "started", "finished", "versions", "git_commit", "git_dirty", "evaluations",
    }  # fmt: skip
