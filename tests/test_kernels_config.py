"""config.kernels: the same numbers whichever runs, a run's id apart from it, and one line where it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import config, data, models, recipe, train, update
from scalelab.config import base, finish, override
from scalelab.errors import BadInput
from tests.helpers import TINY, arguments, environment, scalelab, small_corpus

FAST = ("transformer", "xlstm")


@pytest.mark.parametrize(
    "family",
    [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba2", "mamba", "deltanet", "gla", "moe"))],
)
def test_the_definitions_train_as_the_plain_forms(family):
    losses = {}
    for kernels in ("xla", "reference"):
        shape = recipe.shape(family, 16) | {k: v for k, v in TINY.items() if not k.startswith("model.")}
        conf = finish(base(), {**shape, "model.compute_dtype": "float32", "kernels": kernels})
        trainer = update.Trainer(conf, corpus := data.open(conf.data))
        _, metrics = trainer.step(trainer.initial_state(), corpus.batches(0)[0], np.float32(1e-2))
        losses[kernels] = float(metrics["loss"]), float(metrics["grad_norm"])
    assert losses["xla"] == pytest.approx(losses["reference"], rel=2e-4)


def test_a_run_is_the_same_whichever_implementation_runs():
    conf = finish(base(), TINY)
    ids = {config.RunSpec(finish(conf, {"kernels": kernels}), {}).id for kernels in ("auto", "xla", "cudnn")}
    assert len(ids) == 1


def test_what_cannot_be_is_one_line(tmp_path):
    conf = finish(base(), {**TINY, "kernels": "cudnn"})
    with pytest.raises(BadInput, match=r"config.kernels = 'cudnn': attention: .*takes bfloat16 and float16"):
        update.Trainer(conf, data.open(conf.data))
    with pytest.raises(BadInput, match=r"config.kernels = 'mosaic_tpu': needs a TPU, this is a CPU"):
        train.run(config.RunSpec(finish(base(), {**TINY, "kernels": "mosaic_tpu"}), {}), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    done = scalelab(
        "train", *arguments(small_corpus(tmp_path / "text"), kernels="triton"), cwd=tmp_path, env=environment()
    )
    assert done.returncode == 2
    assert "config.kernels = 'triton': must be one of auto, xla, reference" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


RECURRENT = {
    "mamba": {},
    "mamba2": {},
    "lightning": {},
    "gla": {},
    "deltanet": {},
    "gated_deltanet": {},
    "xlstm": {"model.blocks": (("mlstm", "mlp"), ("slstm", "mlp"))},
}


def test_attention_lowers_for_two_tpus_that_share_a_batch():
    """A kernel that the compiler would have to split is an error."""
    changes = recipe.shape("transformer", 128) | {"model.vocab_size": 32, "model.layers": 1, "kernels": "splash"}
    model = override(base(), changes).model
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    graphdef, params = models.abstract(model, mesh=mesh, kernels="splash")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32, sharding=rows)
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(models.merge(graphdef, params).nll(x, x)[0])))
    text = step.trace(params, tokens).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT)
def test_a_training_step_lowers_for_a_tpu_with_its_kernels(family):
    """Scanned layers, rematerialised, optimizer and all; forward and backward."""
    shape = recipe.shape(family, 256) | RECURRENT[family]
    changes = {"kernels": "mosaic_tpu", "model.layers": 4, "data.seq_len": 256, "model.remat": "full"}
    trainer = update.Trainer(conf := finish(base(), shape | changes), corpus := data.open(base().data))
    rows = corpus.batches(0)[0][: conf.data.batch_size, :257]
    text = trainer.step.trace(trainer.abstract, rows, np.float32(1e-2)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= (4 if family == "xlstm" else 2)
