"""`scalelab probe`: what each family can do, measured; and that the second call trains nothing."""

import math
import re
import runpy

import numpy as np
import pandas as pd
import pytest

from scalelab import cli, data, model_plots, probe, records, sweep, train, update
from scalelab.config import base, builtin_folder, finish, override
from scalelab.data import probes
from scalelab.data.stream import labelled, split_rows
from scalelab.errors import BadInput
from scalelab.evaluate import proportion
from tests.helpers import TINY, environment, scalelab


def accuracies(root, config, sizes):
    """family -> accuracies at the sizes, of all runs of `--config`."""
    runs = [run.spec for run in sweep.expand(config, {}).runs]
    for spec in runs:
        train.run(spec, root)
    table = probe.table([root / spec.id for spec in runs], sizes)
    return {family: rows["accuracy"].tolist() for family, rows in table.groupby("family", sort=False)}


def test_negative_eigenvalues_track_parity_beyond_the_length_of_training(tmp_path):
    """Four times as far. DeltaNet without them differs in nothing but the range of beta, and is trained as long."""
    families = "families=deltanet:deltanet_positive:mamba,lr=0.01"
    found = accuracies(tmp_path, f"probe:task=parity,size=12,width=16,batch=16,steps=100,{families}", [48])
    assert found["deltanet"][0] > 0.95
    assert found["deltanet_positive"][0] < 0.65
    assert found["mamba"][0] < 0.65


@pytest.mark.slow
def test_attention_recalls_pairs_that_a_fixed_state_cannot_hold(tmp_path):
    """Where hundreds of steps must do; the study below is the probe's own size."""
    task = "task=recall,options=least=1:keys=8:values=8,size=4,width=32,batch=32,steps=500,lr=0.005"
    found = accuracies(tmp_path, f"probe:{task},families=hybrid:lightning", [1, 2, 4])
    assert found["hybrid"][2] > 0.8
    assert found["lightning"][0] > found["lightning"][1] > found["lightning"][2]
    assert found["lightning"][2] < 0.65


@pytest.mark.study
def test_who_solves_parity_beyond_the_length_of_training(tmp_path):
    families = "families=slstm:deltanet:gated_deltanet:deltanet_positive:mamba:transformer"
    found = accuracies(tmp_path, f"probe:task=parity,{families}", [20, 40, 80])
    for family in ("slstm", "deltanet"):
        assert found[family][0] > 0.99, family
        assert found[family][1] > 0.9, family
    assert found["gated_deltanet"][1] > 0.7
    for family in ("deltanet_positive", "mamba", "transformer"):
        assert found[family][1] < 0.65, family


@pytest.mark.study
def test_a_hybrid_recalls_and_a_fixed_state_degrades_with_the_pairs(tmp_path):
    found = accuracies(tmp_path, "probe:task=recall,families=hybrid:mamba", [1, 4, 8])
    assert min(found["hybrid"]) > 0.98
    assert found["mamba"][0] > found["mamba"][1] > found["mamba"][2]
    assert found["mamba"][2] < found["hybrid"][2] - 0.2


def test_a_model_that_answers_by_hand_is_scored_by_hand():
    """Right, rows and answers, against a loop."""
    held = probes.Probe("recall,pairs=3,keys=6,values=4", 12, "f").held_out(40 * 12)
    tokens, labels = split_rows(held.tokens)
    conf = finish(base(), {**TINY, "data.sources": {"p": {"kind": "probe", "path": "recall,pairs=3,keys=6,values=4"}},
                           "data.seq_len": 12})  # fmt: skip
    trainer = update.Trainer(conf, data.open(conf.data))
    state = trainer.initial_state()
    from scalelab import models, restore
    from scalelab.config import RunSpec

    spec = RunSpec(conf, data.fingerprint(conf.data))
    opened = restore.Opened(spec, data.open_tokenizer(conf.data), trainer.model, state.params)
    said = np.asarray(models.logits(trainer.model, state.params, tokens))[..., : opened.tokenizer.vocab_size].argmax(-1)
    for alone in (False, True):
        right, asked = probe.answers(opened, held, alone)
        for row in range(len(tokens)):
            at = [i for i in range(12) if labels[row, i] >= 0][-1 if alone else 0 :]
            assert asked[row] == len(at)
            assert right[row] == sum(said[row, i] == labels[row, i] for i in at)


def test_an_error_for_all_right_and_the_binomial_otherwise():
    right = np.array([1.0] * 30 + [0.0] * 10)
    assert proportion(right, np.ones(40)) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 39)))
    value, error = proportion(np.ones(40), np.ones(40))
    assert value == 1
    assert 0.01 < error < 0.03
    assert proportion(np.zeros(1), np.ones(1))[1] > 0.2


def test_only_answers_are_trained_on(tmp_path):
    """The loss and every gradient are those of the answers; what the other positions would say makes no difference."""
    import jax

    source = {"p": {"kind": "probe", "path": "copy,symbols=4,least=1"}}
    conf = finish(base(), {**TINY, "data.sources": source, "data.seq_len": 12, "data.batch_size": 8})
    corpus = data.open(conf.data)
    rows = corpus.batches(0)[0]
    tokens, labels = split_rows(rows)
    results = {}
    for accum in (1, 4):
        changed = finish(conf, {"train.accum_steps": accum})
        trainer = update.Trainer(changed, corpus)
        state, metrics = trainer.step(trainer.initial_state(), rows, np.float32(1e-2))
        results[accum] = (float(metrics["loss"]), float(metrics["grad_norm"]), state.params)
    from scalelab import models

    logits = models.logits(trainer.model, trainer.initial_state().params, tokens)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.maximum(labels, 0)[..., None], -1)[..., 0]
    asked = labels >= 0
    assert 0 < asked.sum() < asked.size
    assert results[1][0] == pytest.approx(nll[asked].mean(), rel=1e-5)
    assert results[4][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[4][1] == pytest.approx(results[1][1], rel=1e-4)
    assert labelled(np.full((1, 2), 3), np.array([[-1]]))[0, 1] < 0


def test_the_command_trains_once_and_draws(tmp_path):
    """A table, a figure, records with the accuracies; the second call trains nothing and scores nothing again."""
    command = ["probe", "--task=copy:symbols=4", "--families=transformer", "--size=4", "--steps=12", "--out=p.png",
               "--lengths=4,8"]  # fmt: skip
    first = scalelab(*command, cwd=tmp_path, env=environment())
    assert first.returncode == 0, first.stderr
    assert "1 trained" in first.stdout
    assert re.search(r"8\*", first.stdout)
    assert re.search(r"transformer +0\.\d{3} \[0\.\d{3}, \d\.\d{3}\]", first.stdout)
    assert (tmp_path / "p.png").stat().st_size > 5000
    table = records.load(tmp_path / "runs")
    assert table["eval.copy@8.accuracy"].between(0, 1).all()
    written = {path: path.read_text() for path in (tmp_path / "runs").glob("*/record.json")}
    second = scalelab(*command, cwd=tmp_path, env=environment())
    assert "1 finished before" in second.stdout
    assert second.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert written == {path: path.read_text() for path in (tmp_path / "runs").glob("*/record.json")}


def test_intervals_of_one_seed_and_ranges_of_several():
    columns = probe.COLUMNS
    rows = [["a", "x", 0, "parity", 8, 0.9, 0.01], ["b", "x", 1, "parity", 8, 0.7, 0.01]]
    several = probe.summary(pd.DataFrame(rows, columns=columns))
    assert several.loc[0, ["accuracy", "low", "high"]].tolist() == pytest.approx([0.8, 0.7, 0.9])
    one = probe.summary(pd.DataFrame(rows[:1], columns=columns))
    assert one.loc[0, ["low", "high"]].tolist() == pytest.approx([0.9 - 0.0196, 0.9 + 0.0196])
    axes = model_plots.probe(several, axis="length", trained=8, chance=0.5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x"]


def test_sizes_of_a_task():
    def spec(path, seq_len):
        conf = override(base(), {"data.sources": {"p": {"kind": "probe", "path": path}}, "data.seq_len": seq_len})
        return type("Spec", (), {"config": conf, "id": "x"})

    assert probe.default_sizes(spec("parity", 21)) == [10, 20, 40, 80]
    assert probe.default_sizes(spec("recall,pairs=16,least=1", 65)) == [2, 4, 8, 16]
    assert probe.default_sizes(spec("copy,delay=2", 19)) == [4, 8, 16, 32]
    for path, seq_len in (("parity", 21), ("copy,delay=3,selective=True", 20), ("recall,pairs=4", 17)):
        task = probes.parse(path, "f")
        size = task.longest(seq_len)
        assert task.up_to(size) == (task, seq_len)
    assert probe.source(spec("recall,pairs=4,least=1", 17), 8).seq_len == 25


def test_bad_input_of_probe_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        ("--task=partiy",): "must be one of parity",
        ("--task=modular,m=5",): "set off by colons",
        ("--task=modular:n=5",): "no such field",
        ("--task=modular:m=1",): "must be at least 2",
        ("--families=slstm,lstm",): "config argument families = 'lstm'",
        ("--families=,",): "families",
        ("--families=slstm,hybrid", "--config.model.layers=3"): "--families = 'hybrid': cannot be trained so",
        ("--families=slstm,slstm",): "is the same run",
        ("--size=-1",): "config argument size",
        ("--size=1",): "too few different rows",
        ("--steps=-1",): "config argument steps",
        ("--seeds=0",): "--seeds = 0",
        ("--jobs=0",): "--jobs = 0",
        ("--lengths=ten",): "must be whole numbers",
        ("--lengths=0",): "must be at least 1",
        ("--lengths=2",): "too few different rows",
        ("--task=recall:keys=16", "--pairs=17"): "keys must be at least pairs",
        ("--out=figure.txt",): "must end in one of",
        ("--out=nowhere/figure.png",): "its folder does not exist",
        ("--config.model.widht=3",): "did you mean width",
        ("--fast",): "not an option here",
    }
    for case, says in cases.items():
        assert cli.main(["probe", *case]) == 2, case
        err = capsys.readouterr().err
        assert says in err, (case, err)
        assert len(err.strip().splitlines()) == 1, (case, err)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match="not trained on one probe"):
        probe.task_of(sweep.plan(finish(base(), {})).spec)


@pytest.mark.parametrize("task", ["parity", "modular", "recall", "copy"])
def test_every_family_can_be_planned_at_the_defaults(task):
    families = runpy.run_path(str(builtin_folder() / "probe.py"))["SHAPES"]
    found = sweep.expand(f"probe:task={task},families={':'.join(families)}", {})
    assert [run.spec.config.family for run in found.runs] == list(families)


def test_a_family_is_the_same_whichever_comes_first():
    def ids(*families):
        runs = sweep.expand(f"probe:task=parity,families={':'.join(families)}", {}).runs
        return {run.spec.config.family: run.spec.id for run in runs}

    names = ("deltanet", "deltanet_positive", "mamba", "slstm", "hybrid", "transformer", "moe", "gated_deltanet")
    together = ids(*names)
    assert len(set(together.values())) == len(names)
    assert together == ids(*reversed(names))
    assert {name: together[name] for name in names[1:3]} == ids(*names[1:3])
