import itertools
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import data, models, records, sharding, train, update
from scalelab.errors import BadInput
from tests.helpers import assert_same_run, final_params, small_corpus, tiny_config, tiny_spec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """An uninterrupted run: (runs folder, record)."""
    root = tmp_path_factory.mktemp("runs")
    return root, train.run(tiny_spec(corpus), root)


class At:
    """A sink that does something once a step is reached."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def write(self, line):
        if line["step"] == self.step:
            self.action()

    def close(self):
        pass


def test_a_run_learns_and_its_record_is_whole(reference, corpus):
    root, record = reference
    assert record.status == "done"
    assert record.loss < math.log(257) - 1
    assert record.loss_se > 0
    assert record.tokens == 40 * 4 * 16
    assert record.flops_6n == 6 * record.params * record.tokens
    assert record.params == sum(x.size for x in jax.tree.leaves(models.init(update.resolve(tiny_config(corpus),
                                data.open(tiny_config(corpus).data)), jax.random.key(0))))  # fmt: skip
    lines = records.read_metrics(root / record.id)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["step"] for line in lines if "held_out" in line] == [10, 20, 30, 40]
    assert lines[-1]["held_out"]["loss"] == record.loss
    assert record.train_loss == pytest.approx(np.mean([line["loss"] for line in lines[-4:]]))
    # The first step's loss is that of the initial model on the first batch.
    assert lines[0]["loss"] == pytest.approx(math.log(257), rel=0.02)
    assert record.seconds >= lines[-1]["seconds"] > 0
    assert sorted(p.name for p in (root / record.id / "checkpoints").iterdir()) == ["40"]
    assert not (root / record.id / "checkpoints" / "40" / "rest").exists()


def test_a_finished_run_is_not_trained_again(reference, corpus):
    root, record = reference
    before = (root / record.id / "record.json").stat().st_mtime_ns
    assert train.run(tiny_spec(corpus), root) == record
    assert (root / record.id / "record.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("every", [0, 6])
def test_sigterm_saves_and_the_same_call_resumes(reference, corpus, tmp_path, every):
    spec = tiny_spec(corpus, checkpoint__every=every)
    terminate = At(17, lambda: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(train.Stopped, match="of 40; the same command resumes it"):
        train.run(spec, tmp_path, [terminate])
    assert records.read(tmp_path / spec.id) is None
    assert signal.getsignal(signal.SIGTERM) is handler
    record = train.run(spec, tmp_path)
    assert record.attempts == 2
    assert_same_run(tmp_path / spec.id, reference[0] / reference[1].id)


def test_seconds_add_up_over_attempts(corpus, tmp_path):
    spec = tiny_spec(corpus, checkpoint__every=10)
    with pytest.raises(train.Stopped):
        train.run(spec, tmp_path, [At(15, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    first = records.last_metrics(tmp_path / spec.id)["seconds"]
    record = train.run(spec, tmp_path)
    lines = records.read_metrics(tmp_path / spec.id)
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))
    assert record.seconds > first


def test_a_failure_leaves_its_reason_and_the_run_can_go_on(reference, corpus, tmp_path):
    spec = tiny_spec(corpus, checkpoint__every=8)

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        train.run(spec, tmp_path, [At(21, fail)])
    failure = (tmp_path / spec.id / "failure.json").read_text()
    assert "No space left on device" in failure
    assert "Traceback" in failure
    for name in ("attempts.json", "metrics.jsonl", "record.json"):  # as a kill in the middle of writing would leave
        (tmp_path / spec.id / f".{name}.k2v9x1").write_text("{")
    train.run(spec, tmp_path)
    assert [path.name for path in (tmp_path / spec.id).glob(".*")] == [".lock"]
    assert not (tmp_path / spec.id / "failure.json").exists()
    assert_same_run(tmp_path / spec.id, reference[0] / reference[1].id)


def test_keep_at_and_final_all(corpus, tmp_path):
    spec = tiny_spec(corpus, checkpoint__keep_at=(7, 20), checkpoint__final="all")
    train.run(spec, tmp_path)
    folder = tmp_path / spec.id / "checkpoints"
    assert sorted(int(p.name) for p in folder.iterdir()) == [7, 20, 40]
    assert (folder / "40" / "rest").exists()


def test_the_last_step_can_be_kept_whole(corpus, tmp_path):
    for final in ("weights", "nothing"):
        spec = tiny_spec(corpus, checkpoint__keep_at=(40,), checkpoint__final=final)
        train.run(spec, tmp_path / final)
        folder = tmp_path / final / spec.id / "checkpoints"
        assert [p.name for p in folder.iterdir()] == ["40"]
        assert (folder / "40" / "rest").exists()


def test_lost_metrics_start_the_run_again(reference, corpus, tmp_path, capsys):
    """Also where a checkpoint of `keep_at` is in the way of the one that is to come."""
    spec = tiny_spec(corpus, checkpoint__keep_at=(7,), checkpoint__every=5)
    with pytest.raises(train.Stopped):
        train.run(spec, tmp_path, [At(17, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    (tmp_path / spec.id / "metrics.jsonl").unlink()
    train.run(spec, tmp_path)
    assert "starting the run again" in capsys.readouterr().err
    assert sorted(int(p.name) for p in (tmp_path / spec.id / "checkpoints").iterdir()) == [7, 40]
    assert_same_run(tmp_path / spec.id, reference[0] / reference[1].id)


def test_final_nothing(corpus, tmp_path):
    spec = tiny_spec(corpus, checkpoint__final="nothing", checkpoint__every=10)
    train.run(spec, tmp_path)
    assert list((tmp_path / spec.id / "checkpoints").iterdir()) == []


def test_a_run_that_blows_up_is_a_result(corpus, tmp_path):
    spec = tiny_spec(corpus, optim__lr=1e30, optim__clip=0.0, checkpoint__every=1)
    record = train.run(spec, tmp_path)
    assert record.status == "diverged"
    assert "step" in record.reason
    assert record.steps < 40
    assert record.loss is None
    assert records.load(tmp_path)["status"].tolist() == ["diverged"]
    assert train.run(spec, tmp_path) == record


def test_a_loss_above_the_limit_is_divergence_too(corpus, tmp_path):
    record = train.run(tiny_spec(corpus, train__diverge_above=0.5, optim__lr=1e-7), tmp_path)
    assert record.status == "diverged"
    assert "train.diverge_above" in record.reason
    assert record.steps == 3  # the first after warm-up (5 % of 40 steps)


# ------------------------------------------------------------------------------------------------ the step


def trainer_and_rows(corpus, **changes):
    conf = tiny_config(corpus, **changes)
    opened = data.open(conf.data)
    trainer = update.Trainer(conf, opened)
    return trainer, sharding.put_rows(next(opened.stream(0, 0)), trainer.mesh)


def test_accumulation_changes_rounding_only(corpus):
    results = []
    for parts in (1, 2, 4):
        trainer, rows = trainer_and_rows(corpus, train__accum_steps=parts, train__z_loss=1e-2, optim__lr=1e-3)
        with jax.default_matmul_precision("highest"):
            state, metrics = trainer.step(trainer.initial_state(), rows, 1e-3)
        results.append((jax.device_get(state.params), float(metrics["loss"]), float(metrics["grad_norm"])))
    for params, loss, norm in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-6)
        assert norm == pytest.approx(results[0][2], rel=1e-5)
        assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=2e-4), params, results[0][0]))


def test_loss_is_nll_alone_and_z_loss_enters_the_gradient(corpus):
    plain, rows = trainer_and_rows(corpus)
    with_z, _ = trainer_and_rows(corpus, train__z_loss=1.0)
    _, a = plain.step(plain.initial_state(), rows, 1e-3)
    _, b = with_z.step(with_z.initial_state(), rows, 1e-3)
    assert float(a["loss"]) == float(b["loss"])
    assert float(b["grad_norm"]) > 1.5 * float(a["grad_norm"])


def test_gradient_is_that_of_the_mean_nll_by_finite_differences(corpus):
    trainer, rows = trainer_and_rows(corpus, optim__clip=0.0)
    params = trainer.initial_state().params
    with jax.default_matmul_precision("highest"):
        mean = lambda p: jnp.mean(trainer.nll(p, rows))  # noqa: E731
        grads = jax.grad(mean)(params)
        _, metrics = trainer.step(trainer.initial_state(), rows, 1e-3)
        norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        direction = jax.tree.map(lambda g: g / norm, grads)
        h = 1e-2
        up, down = (mean(jax.tree.map(lambda p, d: p + s * d, params, direction)) for s in (h, -h))  # noqa: B023
    assert float(up - down) / (2 * h) == pytest.approx(norm, rel=1e-2)


def test_documents_are_masked_only_when_asked(corpus):
    losses = []
    for mask in (True, False):
        trainer, rows = trainer_and_rows(corpus, data__document_mask=mask)
        rows = np.asarray(rows).copy()
        rows[:, 8] = 256  # a new document begins in every row
        losses.append(np.asarray(trainer.nll(trainer.initial_state().params, jnp.asarray(rows))))
    assert np.array_equal(losses[0][:, :8], losses[1][:, :8])
    assert not np.allclose(losses[0][:, 9:], losses[1][:, 9:])


def test_the_vocabulary_must_hold_the_tokenizer(corpus, tmp_path):
    with pytest.raises(BadInput, match=r"config\.model\.vocab_size = 100: the tokenizer has 257 tokens"):
        train.run(tiny_spec(corpus, model__vocab_size=100), tmp_path)
    assert list(tmp_path.iterdir()) == []  # refused before anything was written


def test_more_devices_than_there_are(corpus, tmp_path):
    with pytest.raises(BadInput, match=r"config\.mesh\.data = 64: this machine has 1"):
        train.run(tiny_spec(corpus, mesh__data=64), tmp_path)


def test_changed_data_is_refused(corpus, tmp_path):
    spec = tiny_spec(corpus)
    moved = train.RunSpec(spec.config, {"text": "0" * 64})
    with pytest.raises(BadInput, match="data has changed since the run was planned"):
        train.run(moved, tmp_path)


BASE = {"model__mup__base_width": 16, "model__mup__base_layers": 2, "model__parametrization": "completep"}
MOE = {"model__blocks": (("attention", "moe"),), "model__moe__hidden": 16, "model__moe__bias_rate": 0.01}


def test_at_the_base_completep_trains_to_the_same_bits(reference, corpus, tmp_path):
    root, plain = reference
    record = train.run(tiny_spec(corpus, **BASE), tmp_path)
    assert record.id != plain.id
    assert (record.parametrization, plain.parametrization) == ("completep", "standard")
    assert record.loss == plain.loss
    ours, theirs = final_params(tmp_path / record.id), final_params(root / plain.id)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_under_mup_a_stopped_run_resumes_and_buffers_are_the_routers_alone(corpus, tmp_path):
    half = {"model__parametrization": "mup", "model__mup__base_width": 8, "model__mup__base_layers": 2}
    spec = tiny_spec(corpus, **MOE, **half)
    stop = At(15, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(train.Stopped):
        train.run(spec, tmp_path / "stopped", [stop])
    train.run(spec, tmp_path / "stopped")
    record = train.run(spec, tmp_path / "whole")
    assert_same_run(tmp_path / "stopped" / spec.id, tmp_path / "whole" / spec.id)
    assert record.parametrization == "mup"
    # Neither decay nor Adam has touched the bias: it is a sum of 40 steps of 0.01.
    bias = final_params(tmp_path / "whole" / spec.id)["['period']['0']['channel']['bias']"]
    np.testing.assert_allclose(bias, 0.01 * np.round(bias / 0.01), atol=1e-6)
    assert bias.any()


def test_decay_moves_a_matrix_by_eta_lambda_and_vectors_not_at_all(corpus):
    """The difference that weight decay makes to one update: eta lambda m^(p - 1) p of a matrix."""
    wide = {"model__parametrization": "mup", "model__mup__base_width": 8, "model__mup__base_layers": 2}
    moved = []
    for decay in (0.0, 0.5):
        conf = tiny_config(corpus, optim__weight_decay=decay, optim__decay_exponent=0.5, **wide)
        trainer = update.Trainer(conf, data.open(conf.data))
        state = trainer.initial_state()
        start = jax.device_get(state.params)
        rows = sharding.put_rows(np.ones((4, 17), np.int32), trainer.mesh)
        moved.append(jax.device_get(trainer.step(state, rows, np.float32(0.1))[0].params))
    without, with_decay = moved
    q, norm = (lambda p: p["period"]["0"]["mixer"]["q"]), (lambda p: p["final_norm"]["scale"])
    np.testing.assert_allclose(q(without) - q(with_decay), 0.1 * 0.5 * 2**-0.5 * q(start), rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(norm(without), norm(with_decay))
    np.testing.assert_array_equal(without["embed"], with_decay["embed"])
