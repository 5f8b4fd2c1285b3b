import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import data, models, sample, train, update
from scalelab.checkpoint import load_params
from scalelab.errors import BadInput
from tests.helpers import small_corpus, tiny_spec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    corpus = small_corpus(tmp_path_factory.mktemp("corpus"))
    root = tmp_path_factory.mktemp("runs")
    spec = tiny_spec(corpus, train__steps=60)
    train.run(spec, root)
    return spec, root / spec.id


def test_greedy_text_is_what_the_full_pass_prefers(run):
    spec, folder = run
    text = "".join(sample.text(folder, "the ", tokens=12, temperature=0.0))
    corpus = data.open(spec.config.data)
    model = update.resolve(spec.config, corpus)
    _, shapes = models.abstract(model)
    assert text.startswith("the ")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    _, params = load_params(folder, shapes)
    ids = [corpus.bos, *corpus.tokenizer.encode(text)]
    logits = np.asarray(models.logits(model, params, jnp.asarray([ids])))[0]
    prompt = len(corpus.tokenizer.encode("the "))
    for place in range(prompt, len(ids) - 1):
        assert logits[place].argmax() == ids[place + 1]


def test_a_seed_is_a_text(run):
    _, folder = run
    draw = lambda seed: "".join(sample.text(folder, "", tokens=40, temperature=1.0, seed=seed))  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_what_cannot_be_sampled(run, tmp_path):
    _, folder = run
    with pytest.raises(BadInput, match="--temperature"):
        list(sample.text(folder, temperature=-1))
    with pytest.raises(BadInput, match="--tokens"):
        list(sample.text(folder, tokens=0))
    with pytest.raises(BadInput, match="--temperature"):
        list(sample.text(folder, temperature=float("nan")))
    with pytest.raises(BadInput, match="--seed"):
        list(sample.text(folder, seed=-1))
    with pytest.raises(BadInput, match="--prompt"):
        list(sample.text(folder, "\udcff"))  # what Python makes of an argument that is not UTF-8
    with pytest.raises(BadInput, match="no run's folder"):
        list(sample.text(tmp_path))
    (tmp_path / "spec.json").write_text((folder / "spec.json").read_text())
    with pytest.raises(BadInput, match=r"has no weights \(not trained yet"):
        list(sample.text(tmp_path))


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    """In a process of its own: what Orbax leaves behind would be reported when Python ends."""
    _, folder = run
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy" / "checkpoints").rglob("ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    command = [sys.executable, "-m", "scalelab", "sample", str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "checkpoint of step 60 is damaged" in done.stderr
    assert "has no weights (no checkpoint is sound)\n" in done.stderr
    assert "coroutine" not in done.stderr


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2], r"tokens = 'int32\[2\]': must be whole numbers in rows"),
        ([[0.5]], "must be whole numbers"),
        ([[9999]], "tokens = 9999: must be from 0 to 256"),
        ([[-1]], "must be from 0 to 256"),
    ],
)
def test_logits_are_of_tokens_of_the_vocabulary(run, tokens, says):
    spec, _ = run
    model = models.with_vocabulary(spec.config.model, 257)
    params = models.init(model, jax.random.key(0))
    assert models.logits(model, params, [[1, 2, 3]]).shape == (1, 3, 257)
    with pytest.raises(BadInput, match=says):
        models.logits(model, params, tokens)
