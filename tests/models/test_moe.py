"""Mixtures of experts: what `test_family.py` does not ask of every family."""

import dataclasses
import math
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import section

from pallas_kernels import compat, dispatch
from scalelab import data, models, records, sharding, train, update
from scalelab.errors import BadInput
from scalelab.models.moe import MoE, within_capacity
from scalelab.models.registry import resolve
from tests.helpers import assert_same_run, final_params, small_corpus, tiny_config, tiny_spec, with_devices

pytestmark = pytest.mark.once


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def layer(training=False, seed=0, bias=None, kernels="auto", dtype="float32", **options):
    """(apply, parameters of one layer drawn): `apply(params, x) -> (y, aux)`."""
    changes = {f"moe__{name}": value for name, value in ({"experts": 4, "top_k": 2, "hidden": 12} | options).items()}
    spec = resolve(section(blocks=(("attention", "moe"),), **changes))
    spec = dataclasses.replace(spec, training=training, kernels=kernels, compute_dtype=dtype)
    chosen = spec.period[0].channel_options
    rng = np.random.default_rng(seed)
    draw = lambda tensor, lead=(): jnp.asarray(rng.normal(size=tensor.shape) / tensor.fan_in**0.5, jnp.float32)  # noqa: E731
    module = MoE(spec, chosen, draw)
    params = {name: getattr(module, name)[...] for name in MoE.tensors(spec, chosen)}
    if "bias" in params:
        params["bias"] = jnp.zeros_like(params["bias"]) if bias is None else jnp.asarray(bias, jnp.float32)

    def apply(params, x):
        given = iter([params[name] for name in MoE.tensors(spec, chosen)])
        return MoE(spec, chosen, lambda tensor, lead=(): next(given))(x)

    return apply, params


def inputs(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x, *, k, router="softmax", normalise=True, scale=1.0):
    """Every expert on every token, weighted by zero where it was not chosen."""
    logits = x @ params["router"]
    scores = jax.nn.softmax(logits) if router == "softmax" else jax.nn.sigmoid(logits)
    best = jnp.argsort(-(scores + params.get("bias", 0.0)), axis=-1)[..., :k]
    chosen = jnp.any(best[..., None] == jnp.arange(logits.shape[-1]), axis=-2)
    w = jnp.where(chosen, scores, 0.0)
    if normalise and k > 1:
        w = w / jnp.sum(w, axis=-1, keepdims=True)
    mlp = lambda gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731
    y = 0.0
    for e in range(logits.shape[-1]):
        y += scale * w[..., e, None] * mlp(*(params[name][e] for name in ("gate", "up", "down")))
    if "shared_up" in params:
        y += mlp(*(params[f"shared_{name}"] for name in ("gate", "up", "down")))
    return y


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 3, "normalise": False, "experts": 7},
        {"shared": 2, "router": "sigmoid", "scale": 2.5},
        {"router": "sigmoid", "bias_rate": 0.1, "bias": [0.0, 9.0, 0.0, 5.0]},  # two experts have it all, two nothing
        {"top_k": 1, "router": "sigmoid", "bias_rate": 0.1, "bias": [0.0, 0.0, 0.0, 9.0]},
        {"top_k": 4},
    ],
)
def test_dropless_is_the_dense_loop_in_value_and_gradient(options):
    apply, params = layer(**options)
    x, probe = inputs(3, 11, 16), inputs(3, 11, 16, seed=2)
    known = {name: value for name, value in options.items() if name in ("router", "normalise", "scale")}

    def total(f):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(f(p, x) * probe), argnums=(0, 1)))

    with jax.default_matmul_precision("highest"):
        got = total(lambda p, x: apply(p, x)[0])(params, x)
        want = total(lambda p, x: dense(p, x, k=options.get("top_k", 2), **known))(params, x)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)
    gradient = got[1][0]
    assert jnp.abs(gradient["router"]).max() > 1e-3  # also for k = 1
    if "bias" in params:
        assert not gradient["bias"].any()
        counts = apply(params, x)[1]["counts"]
        chosen = np.asarray(params["bias"]) > 1
        np.testing.assert_array_equal(counts, np.where(chosen, 33.0, 0.0))


@pytest.mark.skipif(not compat.MOSAIC_GPU, reason=f"Mosaic GPU kernels need JAX {compat.MOSAIC_GPU_SINCE}")
def test_kernels_for_gpus_interpreted():
    """Values and every gradient."""
    x, options = inputs(1, 20, 16).astype(jnp.bfloat16), {"hidden": 16, "dtype": "bfloat16"}
    (plain, params), (apply, _) = layer(**options), layer(kernels="mosaic_gpu", **options)

    def all_of(f):
        y, pull = jax.vjp(lambda params, x: f(params, x)[0], params, x)
        return y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    with dispatch.interpreted():
        found = all_of(apply)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(all_of(plain)), strict=True):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        assert jnp.linalg.norm(got - want) < 1e-2 * jnp.linalg.norm(want)


def test_tokens_do_not_know_each_other():
    apply, params = layer(experts=6)
    x, order = inputs(1, 40, 16), np.random.default_rng(3).permutation(40)
    np.testing.assert_allclose(apply(params, x[:, order])[0], apply(params, x)[0][:, order], rtol=1e-6, atol=1e-6)
    one = jnp.concatenate([apply(params, x[:, i])[0] for i in range(40)])  # (1, D) each, as in decoding
    close(one, apply(params, x)[0][0])


def test_only_the_best_groups_compete():
    apply, params = layer(experts=6, groups=3, top_groups=1, top_k=2, router="sigmoid", bias_rate=0.1,
                          bias=[0.0, 0.0, 5.0, 5.0, 8.0, 0.0])  # fmt: skip
    counts = apply(params, inputs(2, 9, 16))[1]["counts"]
    np.testing.assert_array_equal(counts, [0, 0, 18, 18, 0, 0])  # 5 + 5 beats 8 + 0


# ------------------------------------------------------------------------------------ capacity


def test_capacity_fills_first_choices_first():
    chosen = np.asarray(jax.lax.top_k(inputs(2, 13, 5), 2)[1])
    got = np.asarray(within_capacity(jnp.asarray(chosen), 5, 0.8))
    room = math.ceil(0.8 * 13 * 2 / 5)
    want = np.full_like(chosen, 5)
    for b in range(2):
        taken = np.zeros(5, int)
        for slot in range(2):
            for t in range(13):
                e = chosen[b, t, slot]
                if taken[e] < room:
                    want[b, t, slot], taken[e] = e, taken[e] + 1
    np.testing.assert_array_equal(got, want)
    assert (want == 5).any()


def test_capacity_drops_in_training_only_and_says_how_many():
    options = {"capacity": 0.5, "top_k": 2, "experts": 4}
    apply, params = layer(**options)
    dropping, _ = layer(training=True, **options)
    plain, _ = layer(experts=4)
    x = inputs(2, 12, 16)
    np.testing.assert_array_equal(apply(params, x)[0], plain(params, x)[0])
    y, aux = dropping(params, x)
    assert apply(params, x)[1]["dropped"] == 0
    assert 24 <= aux["dropped"] < 48  # at most half of 48 choices has room
    np.testing.assert_array_equal(aux["counts"], apply(params, x)[1]["counts"])  # before any was dropped
    logits = x @ params["router"]
    w, chosen = jax.lax.top_k(jax.nn.softmax(logits), 2)
    w = w / jnp.sum(w, axis=-1, keepdims=True)
    kept = within_capacity(chosen, 4, 0.5)
    want = sum(
        jnp.where(kept == e, w, 0.0).sum(-1)[..., None]
        * ((jax.nn.silu(x @ params["gate"][e]) * (x @ params["up"][e])) @ params["down"][e])
        for e in range(4)
    )
    close(y, want)
    everything, _ = layer(training=True, **options | {"capacity": 2.0})
    close(everything(params, x)[0], y if not aux["dropped"] else plain(params, x)[0])


# ------------------------------------------------------------------------------------ balance


def two_domains():
    """Sequences of two kinds, each with two experts of its own: balanced together, not apart."""
    x = np.zeros((4, 8, 16), np.float32)
    x[:2, :, 0], x[2:, :, 1] = 1, 1
    router = np.zeros((16, 4), np.float32)
    router[0], router[1] = [8, 8, 0, 0], [0, 0, 8, 8]
    return jnp.asarray(x), jnp.asarray(router)


def test_scopes_of_the_balance_loss():
    x, router = two_domains()
    losses = {}
    for scope, n in (("sequence", 1), ("micro_batch", 1), ("micro_batch", 2), ("micro_batch", 4), ("global", 1)):
        apply, params = layer(lbl=1.0, z_loss=0.0, lbl_scope=scope, lbl_sequences=n)
        losses[scope, n] = float(apply(params | {"router": router}, x)[1]["loss"])
    apart = pytest.approx(2.0, abs=2e-3)  # Ne / k
    assert losses["sequence", 1] == losses["micro_batch", 1] == apart
    assert losses["micro_batch", 2] == apart
    assert losses["micro_batch", 4] == losses["global", 1] == pytest.approx(1.0, abs=1e-5)
    mixed = x[jnp.array([0, 2, 1, 3])]  # each micro-batch of two has one of each kind
    apply, params = layer(lbl=1.0, z_loss=0.0, lbl_scope="micro_batch", lbl_sequences=2)
    assert float(apply(params | {"router": router}, mixed)[1]["loss"]) == pytest.approx(1.0, abs=1e-5)
    apply, params = layer(lbl_scope="micro_batch", lbl_sequences=3, training=True)
    with pytest.raises(BadInput, match=r"lbl_sequences = 3: must divide the 4 sequences"):
        apply(params, x)
    apply, params = layer(lbl_scope="micro_batch", lbl_sequences=3)  # as when one prompt is scored
    assert np.isfinite(apply(params, x)[0]).all()


def test_the_losses_by_hand():
    apply, params = layer(lbl=0.3, z_loss=0.7, router="sigmoid", experts=5)
    x = inputs(2, 6, 16)
    logits = np.asarray(x @ params["router"], np.float64).reshape(12, 5)
    s = 1 / (1 + np.exp(-logits))
    f = np.bincount(np.argsort(-s, axis=1)[:, :2].ravel(), minlength=5) / 24
    P = (s / s.sum(1, keepdims=True)).mean(0)
    z = np.log(np.exp(logits).sum(1)) ** 2
    _, aux = apply(params, x)
    assert float(aux["loss"]) == pytest.approx(0.3 * 5 * (f * P).sum() + 0.7 * z.mean(), rel=1e-5)
    entropy = -(P_t := s / s.sum(1, keepdims=True)) * np.log(P_t)
    chosen = resolve(section(moe__experts=5, blocks=(("attention", "moe"),))).period[0].channel_options
    got = MoE.summary(chosen, aux)
    want = {
        "balance": 5 * (f * P).sum(), "router_entropy": entropy.sum(1).mean(), "max_violation": f.max() * 5 - 1,
        "load_entropy": -(f[f > 0] * np.log(f[f > 0])).sum(), "drop_rate": 0.0, "load": f,
    }  # fmt: skip
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_gradient_of_loss_and_output_where_choices_are_fixed():
    apply, params = layer(lbl=0.5, z_loss=0.1, router="sigmoid", bias_rate=0.1, bias=[0.0, 5.0, 0.0, 9.0])
    x = inputs(2, 6, 16)

    def loss(params):
        y, aux = apply(params, x)
        return jnp.sum(y**2) + aux["loss"]

    rng = np.random.default_rng(5)
    direction = {k: jnp.asarray(rng.normal(size=v.shape) * (k != "bias"), jnp.float32) for k, v in params.items()}
    direction = jax.tree.map(lambda d: 0.1 * d, direction)
    with jax.default_matmul_precision("highest"):
        h = 1e-2
        at = {n: float(jax.jit(loss)(jax.tree.map(lambda a, d: a + n * h * d, params, direction)))  # noqa: B023
              for n in (-2, -1, 1, 2)}  # fmt: skip
        gradient = jax.jit(jax.grad(loss))(params)
    numeric = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    exact = sum(float(jnp.vdot(gradient[name], direction[name])) for name in params)
    assert exact == pytest.approx(numeric, rel=2e-3)


# ------------------------------------------------------------------------------------ in training

SMALL = {
    "model__blocks": (("attention", "moe"),), "model__moe__experts": 4, "model__moe__hidden": 8, "family": "moe",
}  # fmt: skip
LING = SMALL | {
    "model__moe__router": "sigmoid", "model__moe__bias_rate": 0.01, "model__moe__shared": 1,
    "model__moe__lbl_scope": "sequence",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def one_step(corpus, rate=1e-3, **changes):
    conf = tiny_config(corpus, **changes)
    opened = data.open(conf.data)
    trainer = update.Trainer(conf, opened)
    rows = sharding.put_rows(next(opened.stream(0, 0)), trainer.mesh)
    with jax.default_matmul_precision("highest"):
        return trainer, *trainer.step(trainer.initial_state(), rows, rate)


@pytest.mark.parametrize("centred", [False, True])
def test_the_bias_is_moved_by_the_rule_alone(corpus, centred):
    biases = []
    for parts in (1, 4):
        changes = LING | {"model__moe__bias_centred": centred, "train__accum_steps": parts, "optim__weight_decay": 0.5}
        trainer, state, metrics = one_step(corpus, **changes)
        bias = np.asarray(state.params["period"]["0"]["channel"]["bias"])
        f = np.asarray(metrics["load"])
        sign = np.sign(0.25 - f)
        np.testing.assert_allclose(bias, 0.01 * (sign - centred * sign.mean(1, keepdims=True)), atol=1e-8)
        assert (bias != 0).any()
        # Whatever the optimiser holds of it is zero: it has no gradient.
        moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
                   if jax.tree_util.DictKey("bias") in path]  # fmt: skip
        assert moments
        assert not any(np.any(m) for m in moments)
        biases.append(bias)
    np.testing.assert_array_equal(*biases)
    assert trainer.model.moe.bias_rate == 0.01


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_accumulation_changes_rounding_only(corpus, scope):
    changes = SMALL | {"model__moe__lbl": 1.0, "model__moe__lbl_scope": scope, "optim__clip": 0.0}
    results = [one_step(corpus, train__accum_steps=parts, **changes) for parts in (1, 4)]
    for _, _, metrics in results[1:]:
        for name, value in results[0][2]["routing"].items():
            assert float(metrics["routing"][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(float(results[0][2]["grad_norm"]), rel=1e-5)


def test_a_run_is_stopped_and_resumed_with_its_bias_and_its_record(corpus, tmp_path):
    spec = tiny_spec(corpus, **LING)
    reference = train.run(spec, tmp_path / "whole")

    class Terminate:
        def write(self, line):
            if line["step"] == 17:
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self):
            pass

    with pytest.raises(train.Stopped):
        train.run(spec, tmp_path / "cut", [Terminate()])
    record = train.run(spec, tmp_path / "cut")
    assert record.attempts == 2
    assert_same_run(tmp_path / "cut" / spec.id, tmp_path / "whole" / spec.id)
    bias = final_params(tmp_path / "whole" / spec.id)["['period']['0']['channel']['bias']"]
    assert 0 < np.abs(bias).max() <= 0.4 + 1e-6  # at most 40 steps of 0.01
    lines = records.read_metrics(tmp_path / "whole" / spec.id)
    names = {"balance", "router_entropy", "load_entropy", "max_violation", "drop_rate"}
    assert all(set(line["routing"]) == names and ("load" in line) == ("held_out" in line) for line in lines)
    assert set(reference.routing) == names | {"load"}
    assert reference.routing["balance"] == pytest.approx(np.mean([line["routing"]["balance"] for line in lines[-4:]]))
    assert np.shape(reference.routing["load"]) == (2, 4)
    np.testing.assert_allclose(np.sum(reference.routing["load"], axis=1), 1, atol=1e-4)
    assert reference.params_active < reference.params


def test_dropping_is_recorded(corpus, tmp_path):
    record = train.run(tiny_spec(corpus, **SMALL, model__moe__capacity=0.5, train__steps=4), tmp_path)
    assert 0.5 <= record.routing["drop_rate"] < 1


PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from scalelab import models, update
from scalelab.config import base, override

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
everywhere, over = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
rows = np.asarray(jax.random.randint(jax.random.key(1), (16, 17), 0, 48), np.int32).copy()
rows[:8] //= 8  # two domains

def step(scope, parts, shards):
    config = override(base(), {"model.vocab_size": 48, "model.width": 16, "model.layers": 2, "model.loss_chunk": 64,
        "model.compute_dtype": "float32", "model.attention.head_dim": 4, "model.blocks": (("attention", "moe"),),
        "model.moe.experts": 4, "model.moe.hidden": 8, "model.moe.lbl": 3.0, "model.moe.lbl_scope": scope,
        "model.moe.capacity": 1.5, "model.moe.bias_rate": 0.01, "model.init": "fan_in", "train.accum_steps": parts})
    nll = update.make_nll(config, config.model, 0, training=True, mesh=mesh if shards > 1 else None)
    params = jax.jit(lambda key: models.init(config.model, key))(jax.random.key(0))
    state, batch = update.TrainState(params, optax.identity().init(params), jnp.zeros((), jnp.int32)), rows
    if shards > 1:
        state, batch = jax.device_put(state, everywhere), jax.device_put(rows, over)
    run = jax.jit(update.make_step(config, config.model, nll, optax.identity()))
    with jax.default_matmul_precision("highest"):
        program = run.lower(state, batch, np.float32(1)).compile()
    after, metrics = program(state, batch, np.float32(1))  # new parameters: old ones less the gradient
    moves = re.findall(r"= \\S+ (all-gather|all-to-all|collective-permute)", program.as_text())
    assert not moves, moves
    if shards > 1:
        bias = after.params["period"]["0"]["channel"]["bias"]
        assert len({s.data.tobytes() for s in map(lambda s: np.asarray(s.data), bias.addressable_shards)}) == 1
    return jax.device_get((after.params, metrics))

scopes = {}
for scope in ("global", "sequence"):
    want = scopes[scope] = step(scope, 1, 1)
    for parts, shards in ((1, 8), (2, 8), (4, 1)) if scope == "global" else ((2, 8),):
        got = step(scope, parts, shards)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)
gap = max(np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(scopes[s][0]) for s in scopes)))
assert gap > 1e-3, gap  # the scope matters here
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_and_accumulation_change_nothing_of_the_global_balance():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=with_devices(8), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, r"moe\.top_k = 5: must be at most the 4 experts"),
        ({"router": "hash"}, r"moe\.router"),
        ({"lbl_scope": "device"}, r"moe\.lbl_scope"),
        ({"groups": 3}, r"moe\.groups = 3: must cut 4 experts"),
        ({"groups": 2, "top_groups": 3}, r"moe\.top_groups"),
        ({"hidden": 0}, r"moe\.hidden"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        models.validate(
            section(blocks=(("attention", "moe"),), moe__experts=4, **{f"moe__{k}": v for k, v in options.items()})
        )
