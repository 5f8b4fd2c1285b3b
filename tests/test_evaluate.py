import math

import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import data, sharding
from scalelab.evaluate import Evaluator, ratio
from tests.helpers import small_corpus, tiny_config


def test_ratio_and_its_error_against_a_simulation():
    """Documents of very different lengths: the standard error is the spread of the ratio over redrawn sets."""
    rng = np.random.default_rng(0)

    def draw(n=200):
        tokens = rng.lognormal(4, 1, n).round() + 1
        nats = tokens * rng.normal(2, 0.3, n)
        return ratio(nats, tokens)

    values, errors = np.array([draw() for _ in range(2000)]).T
    assert values.std() == pytest.approx(np.sqrt((errors**2).mean()), rel=0.05)
    assert math.isnan(ratio(np.ones(1), np.ones(1))[1])


def fake_nll(params, rows):
    """Nats that depend on the target alone: 0.01 per byte value."""
    return params * jnp.asarray(rows)[:, 1:].astype(jnp.float32)


def test_every_held_out_token_is_scored_once_whatever_the_batch(tmp_path):
    corpus_folder = small_corpus(tmp_path)
    results = []
    for batch, seq_len in ((4, 16), (7, 16), (4, 33)):
        conf = tiny_config(corpus_folder, data__batch_size=batch, data__seq_len=seq_len)
        corpus = data.open(conf.data)
        held = corpus.held_out()["text"]
        evaluator = Evaluator(corpus.held_out(), {"text": 1.0}, batch, sharding.mesh(conf), fake_nll)
        results.append(evaluator(0.01))
        targets = held.tokens[:, 1:][held.doc >= 0]
        assert results[-1]["loss"] == pytest.approx(0.01 * targets.mean(), rel=1e-6)
        bits = 0.01 * targets.sum() / math.log(2) / held.bytes.sum()
        assert results[-1]["bpb"] == pytest.approx(bits, rel=1e-6)
    for other in results[1:]:
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        assert other["loss_se"] == pytest.approx(results[0]["loss_se"], rel=1e-6)


def test_sources_are_averaged_by_their_weight(tmp_path):
    conf = tiny_config(small_corpus(tmp_path))
    held = data.open(conf.data).held_out()["text"]
    shifted = data.HeldOut(np.minimum(held.tokens + 50, 255), held.doc, held.bytes)
    evaluator = Evaluator({"a": held, "b": shifted}, {"a": 3.0, "b": 1.0}, 4, sharding.mesh(conf), fake_nll)
    found = evaluator(0.01)
    a, b = found["sources"]["a"], found["sources"]["b"]
    assert found["loss"] == pytest.approx(0.75 * a["loss"] + 0.25 * b["loss"])
    assert found["loss_se"] == pytest.approx(math.hypot(0.75 * a["loss_se"], 0.25 * b["loss_se"]))
