"""Runs that start from another's parameters."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from scalelab import config, data, exchange, flops, models, records, start, sweep, train, update
from scalelab.errors import BadInput
from tests.helpers import assert_same_run, environment, final_params, scalelab, small_corpus, tiny_config, tiny_spec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def old(corpus, tmp_path_factory):
    """A finished run of the plain model."""
    root = tmp_path_factory.mktemp("runs")
    record = train.run(tiny_spec(corpus), root)
    return root / record.id


def recycled(old, **changes):
    arg = ",".join(f"{name}={value}" for name, value in {"streams": 3, "prefix": 2, "steps": 20, **changes}.items())
    return sweep.plan(config.load(f"recycle:run={old},{arg}", {})).spec


def test_recycling_trains_the_new_tensors_alone(old, tmp_path):
    spec = recycled(old, lr=0.03)
    record = train.run(spec, tmp_path)
    before, after = final_params(old), final_params(tmp_path / spec.id)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    fresh = jax.jit(lambda key: models.init(update.resolve(spec.config, data.open(spec.config.data)), key))
    drawn = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(fresh(jax.random.key(0)))}
    new = after.keys() - before.keys()
    assert {name.split("'")[-2] for name in new} == {"prefix_k", "prefix_v", "inward", "inward_bias", "out", "out_bias"}
    assert all((after[name] != drawn[name]).any() for name in new)
    lines = records.read_metrics(tmp_path / spec.id)
    assert np.mean([line["loss"] for line in lines[-5:]]) < np.mean([line["loss"] for line in lines[:5]])
    assert (record.start, record.start_train) == (spec.content[start.CONTENT], "new")


def test_frozen_matrices_cost_no_gradient(old):
    """The count by roles is that of the matrix products in the gradient."""
    spec = recycled(old)
    corpus = data.open(spec.config.data)
    model, T = update.resolve(spec.config, corpus), spec.config.data.seq_len
    mask = start.trained(spec.config, model)
    _, nll = (update.make_nll(spec.config, model, corpus.bos, training=training) for training in (False, True))
    shapes = models.abstract(model)[1]
    rows = jax.ShapeDtypeStruct((2, T + 1), np.int32)

    def products(trained):
        def loss(own, params, rows):
            return nll(start.put(params, own), rows)[0].sum()

        return flops.jaxpr_matmul_flops(jax.grad(loss), start.part(shapes, trained), shapes, rows)

    saved = flops.weight_products(model, jax.tree.map(lambda new: not new, mask))
    head = 2 * model.width * model.vocab_size  # whose gradient the rule of the cross-entropy forms along with x's
    assert products(None) - products(mask) == (saved - head) * 2 * T
    everything = flops.per_token(model, T).training
    assert start.flops_per_token(spec.config, model) == everything - saved
    planned = sweep.plan(spec.config)
    assert planned.flops == (everything - saved) * planned.tokens


def test_ids_know_the_start_by_content(old, corpus, tmp_path):
    first = recycled(old)
    (tmp_path / "elsewhere").symlink_to(old)
    start.load.cache_clear()
    assert recycled(tmp_path / "elsewhere").id == first.id
    assert recycled(old, train="all").id != first.id
    other = train.run(tiny_spec(corpus, seed=1), tmp_path)
    assert recycled(tmp_path / other.id).id != first.id


def test_a_recycled_run_resumes(old, tmp_path):
    class Once:
        def write(self, line):
            if line["step"] == 11:
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self):
            pass

    spec = recycled(old)
    train.run(spec, tmp_path / "whole")
    with pytest.raises(train.Stopped):
        train.run(spec, tmp_path / "two", [Once()])
    train.run(spec, tmp_path / "two")
    assert_same_run(tmp_path / "two" / spec.id, tmp_path / "whole" / spec.id)


def test_an_imported_model_goes_on(old, corpus, tmp_path):
    """Training goes on where the weights left off: the first loss is that of the old model."""
    plain = tiny_config(corpus)
    model = update.resolve(plain, data.open(plain.data))
    exchange.save(model, start.load(str(old)), tmp_path / "mine")
    spec = sweep.plan(tiny_config(corpus, start__path=str(tmp_path / "mine"), train__steps=4)).spec
    record = train.run(spec, tmp_path / "runs")
    assert record.start_train == "all"
    lines = records.read_metrics(tmp_path / "runs" / record.id)
    assert lines[0]["loss"] < records.read_metrics(old)[0]["loss"] - 1
    other = sweep.plan(tiny_config(corpus, start__path=str(old), train__steps=4)).spec
    assert other.id == record.id  # the same parameters, in another form


def test_what_cannot_be_a_start_is_refused(old, corpus, tmp_path):
    cases = [
        ({"start__path": str(tmp_path)}, "must be the folder of a run with weights"),
        ({"start__path": str(old), "model__width": 24}, "its tensor embed of shape"),
        ({"start__path": str(old), "start__train": "new"}, "has no tensor that the start lacks"),
    ]
    for changes, says in cases:
        with pytest.raises(BadInput, match=says):
            sweep.plan(tiny_config(corpus, **changes))
    for changes, says in [({"start__train": "new"}, "needs config.start.path"), ({"start__train": "x"}, "one of all")]:
        with pytest.raises(BadInput, match=says):
            tiny_config(corpus, **changes)
    for arg, says in {"run=nowhere": "it has no spec.json", f"run={old},streams=1": "must be at least 2"}.items():
        done = scalelab("plan", f"--config=recycle:{arg}", cwd=tmp_path, env=environment())
        assert (done.returncode, says in done.stderr, done.stderr.count("\n")) == (2, True, 1)


def test_older_records_have_no_start(old):
    document = json.loads((old / "record.json").read_text())
    assert document.pop("start") is None
    assert records.RunRecord.from_json(json.dumps(document)).start is None
