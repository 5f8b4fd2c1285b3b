"""Every family of the recipe, and the first xLSTM's blocks, train: on the embedded corpus, below the entropy of its
single bytes."""

import numpy as np
import pytest

from scalelab import data, recipe, records, sweep, train
from scalelab.config import base, finish

IN_CI = ("transformer", "xlstm", "deltanet")
PAPERS = ("xlstm:mixer=slstm", "xlstm:mixer=mlstm_up")
EACH = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.study) for name in (*recipe.FAMILIES, *PAPERS)]


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
def test_a_family_learns_more_than_how_often_each_byte_occurs(family, tmp_path):
    name, options = recipe.with_options(family)
    changes = {
        **recipe.sized(name, 2e4, **options),
        "model.compute_dtype": "float32", "data.seq_len": 64, "data.batch_size": 8,
        "data.held_out_tokens": 16384, "train.steps": 100, "train.eval_every": 1.0,
    }  # fmt: skip
    conf = finish(base(), changes)
    corpus = data.open(conf.data)
    counts = np.bincount(np.concatenate([corpus.held_out()["stdlib"].tokens[:, 1:].ravel()]), minlength=257)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    record = train.run(sweep.plan(conf).spec, tmp_path)
    assert record.status == "done"
    assert record.loss + 3 * record.loss_se < entropy, (record.loss, entropy)
    assert len(records.read_metrics(tmp_path / record.id)) == 100
    if family == "mor":  # the threshold takes about as many tokens of text never seen as there was room for in training
        np.testing.assert_allclose(record.routing["held_out_selected"], [1, 2 / 3, 1 / 3], atol=0.2)
        assert record.routing["accuracy_2"] > 0.75
