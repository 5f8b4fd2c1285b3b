import json
import sys
import types

import pytest

from scalelab import records, track, train
from tests.helpers import small_corpus, tiny_spec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def test_metrics_file_keeps_what_it_is_told_and_appends(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    sink = track.MetricsFile(tmp_path, [{"step": 1}])
    sink.write({"step": 2, "loss": float("nan"), "held_out": {"loss": float("inf")}})
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2, "loss": None, "held_out": {"loss": None}}]


def test_the_progress_bar_shows_steps_and_losses(monkeypatch, capsys):
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "held_out": {"loss": 2.125}}]
    for terminal in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        bar = track.ProgressBar(4, "run")
        for line in lines:
            bar.write(line)
        bar.close()
        shown = capsys.readouterr().err
        if not terminal:
            assert shown == ""
    assert "2/4" in shown
    assert "loss 2.250, held-out 2.125" in shown


def test_wandb_is_imported_only_when_asked_and_works_offline(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    train.run(tiny_spec(corpus, train__steps=3), tmp_path / "without")

    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    spec = tiny_spec(corpus, train__steps=3, log__wandb="offline")
    train.run(spec, tmp_path / "with")
    assert calls[0]["mode"] == "offline"
    assert calls[0]["id"] == spec.id
    assert [call[0] for call in calls[1:-1]] == [1, 2, 3]
    assert "held_out/loss" in calls[3][1]
    assert calls[-1] == "end"


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_a_failing_sink_never_touches_the_run(corpus, tmp_path, monkeypatch, capsys, where):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    run = types.SimpleNamespace(log=fail if where == "log" else lambda *a, **k: None, finish=fail)
    fake = types.SimpleNamespace(init=fail if where == "init" else lambda **kwargs: run)
    monkeypatch.setitem(sys.modules, "wandb", None if where == "import" else fake)
    spec = tiny_spec(corpus, train__steps=3, log__wandb="online")
    assert train.run(spec, tmp_path).status == "done"
    assert len(records.read_metrics(tmp_path / spec.id)) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb failed" in line]
    assert len(said) == 1


@pytest.mark.slow
def test_real_wandb_offline(corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = tiny_spec(corpus, train__steps=3, log__wandb="offline")
    train.run(spec, tmp_path)
    assert list((tmp_path / spec.id / "wandb").glob("offline-run-*"))


def test_tensorboard_has_every_step(corpus, tmp_path):
    pytest.importorskip("tensorboardX")
    spec = tiny_spec(corpus, train__steps=3, log__tensorboard=True)
    train.run(spec, tmp_path)
    files = list((tmp_path / spec.id / "tensorboard").iterdir())
    assert len(files) == 1
    content = files[0].read_bytes()
    assert content.count(b"grad_norm") == 3
    assert b"held_out/loss" in content
