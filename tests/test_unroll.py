"""Blocks written out one by one train as the loop over them does."""

import jax
import numpy as np
import pytest

from scalelab import data, update
from scalelab.config import base, finish
from scalelab.models import lm
from tests.helpers import TINY


@pytest.mark.parametrize(("layers", "apart"), [(1, lm.APART), (3, lm.APART), (3, 0)])
def test_a_step_is_the_same_written_out_or_in_a_loop(layers, apart, monkeypatch):
    """However the layers' gradients are put together."""
    monkeypatch.setattr(lm, "APART", apart)
    results = []
    for unroll in (1, 2, 0):
        conf = finish(base(), {**TINY, "model.layers": layers, "unroll": unroll or 10**6})
        trainer = update.Trainer(conf, corpus := data.open(conf.data))
        state, metrics = trainer.step(trainer.initial_state(), corpus.batches(0)[0], np.float32(1e-2))
        results.append((float(metrics["loss"]), state.params))
    for loss, params in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
