"""Mixture-of-Recursions: what `test_family.py` does not ask of every family."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import close, forms, tokens
from family import FAMILY, V, section
from flax import nnx

from scalelab import config as configs
from scalelab import data, flops, models, records, sharding, train, update
from scalelab.config import base, override
from scalelab.errors import BadInput
from scalelab.models import recursion
from scalelab.models.registry import resolve
from tests.helpers import small_corpus, tiny_config, tiny_spec

pytestmark = pytest.mark.once

ATTENTION = ("attention", "mlp")
LINEAR = section(prefix=(ATTENTION,), suffix=(ATTENTION,), layers=4, recursion__count=3, recursion__alpha=2.0,
                 recursion__temperature=0.7, recursion__loss=0.5)  # fmt: skip
MODELS = {
    "linear": LINEAR,  # two shared layers, 1, 2/3, 1/3
    "uneven": override(LINEAR, {"recursion.capacities": (0.7, 0.7, 0.45)}),
    "mor": FAMILY["mor"],
    "mor_moe": FAMILY["mor_moe"],
}
each = pytest.mark.parametrize("name", MODELS)
stirred, full, extend, start = forms(MODELS)
of_families = forms(FAMILY)[0]
SEGMENTS = jnp.array([[0] * 4 + [1] * 9, [2] * 13])


@functools.cache
def built(name):
    """As elsewhere, but for a router of which every recursion's threshold selects some tokens and not all."""
    graphdef, params = stirred(name)
    router = params["recursion"]["router"]
    drawn = np.random.default_rng(4).normal(size=router.shape).astype(np.float32)
    return graphdef, params | {"recursion": {"router": jnp.asarray(drawn)}}


def hidden(name, **way):
    """(parameters, text, segments) -> what the head reads and aux."""
    graphdef, _ = models.abstract(MODELS[name], **way)
    return lambda params, text, segments=None: models.merge(graphdef, params).hidden(text, segments)


def logits(model, r, x):
    o = model.spec.recursion
    return x @ model.recursion.router[...][r] / o.temperature


def by_hand(name, params, text, segments, select):
    """The stack on whole rows, a layer after the other. `select(r, z, active)`: which of the active tokens stay."""
    model = models.merge(models.abstract(MODELS[name])[0], params)
    o, positions = model.spec.recursion, jnp.arange(text.shape[1])[None]
    segments = jnp.zeros_like(text) if segments is None else segments
    x = model._embed(text, positions)
    for block in model.prefix.values():
        x = block(x, segments, positions)[0]
    blocks, stacked = nnx.split(model.period)
    active, seen = np.ones(text.shape, bool), []
    for r in range(o.count):
        z, y, competing = logits(model, r, x), x, active
        active = select(r, z, active)
        own = jnp.where(active, segments, -1 - jnp.arange(text.shape[1]))  # no one sees a token that is left out
        for i in range(model.spec.repeats):
            for block in nnx.merge(blocks, jax.tree.map(lambda a, i=i: a[i], stacked)).values():
                y = block(y, own, positions)[0]
        x = jnp.where(active[..., None], x + o.alpha * jax.nn.sigmoid(z)[..., None] * y, x)
        seen.append((z, competing, active))
    for block in model.suffix.values():
        x = block(x, segments, positions)[0]
    return model._final(x), seen


def top(name):
    """What training selects: of each row the best of those in the running, as many as the capacity has room for."""
    capacities = {"linear": (1, 2 / 3, 1 / 3), "uneven": (0.7, 0.7, 0.45), "mor": (1, 0.5)}[name]

    def select(r, z, active):
        chosen = np.zeros(active.shape, bool)
        for b, row in enumerate(np.where(active, np.asarray(z), -np.inf)):
            chosen[b, np.argsort(-row, kind="stable")[: math.ceil(capacities[r] * row.size - 1e-9)]] = True
        return chosen

    return select


@pytest.mark.parametrize(
    ("name", "segments"), [("linear", None), ("linear", SEGMENTS), ("uneven", SEGMENTS), ("mor", SEGMENTS)]
)
def test_training_runs_the_block_on_the_best_tokens_and_leaves_the_others(name, segments):
    """Gathered, against whole rows in which the others are hidden: values, gradients and the auxiliary loss."""
    _, params = built(name)
    text, probe = tokens(2, 13), jax.random.normal(jax.random.key(5), (2, 13, 16))
    select, coefficient = top(name), MODELS[name].recursion.loss
    choices = {"linear": (1, 2), "uneven": (0, 2), "mor": (1,)}[name]
    # Choices are read off outside of the gradient, which holds them fixed.
    chosen = [active for _, _, active in by_hand(name, params, text, segments, select)[1]]
    counts = [int(c.sum(1)[0]) for c in chosen]
    assert counts == {"linear": [13, 9, 5], "uneven": [10, 10, 6], "mor": [13, 7]}[name]

    def want(params):
        x, seen = by_hand(name, params, text, segments, lambda r, z, active: chosen[r])
        loss = 0.0
        for r in choices:
            z, competing, active = seen[r]
            bce = jnp.logaddexp(0.0, jnp.where(active, -z, z))
            loss += coefficient * jnp.sum(bce * competing) / competing.sum()
        return jnp.sum(x * probe) + loss, (x, loss)

    def got(params):
        x, aux = hidden(name, training=True)(params, text, segments)
        return jnp.sum(x * probe) + aux["loss"], (x, aux["loss"])

    with jax.default_matmul_precision("highest"):
        mine, wanted = (jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (got, want))
    jax.tree.map(lambda a, b: close(a, b, 2e-4), mine, wanted)
    assert jnp.abs(mine[1]["recursion"]["router"]).max(axis=1).min() > 1e-3  # every recursion's router learns


@pytest.mark.parametrize("name", ["linear", "uneven", "mor"])
def test_everything_else_selects_by_the_sign_of_the_logit(name):
    _, params = built(name)
    text = tokens(2, 13)
    free = [c == 1 for c in {"linear": (1, 2, 2), "uneven": (2, 1, 2), "mor": (1, 2)}[name]]
    want, seen = by_hand(name, params, text, SEGMENTS, lambda r, z, active: active if free[r] else active & (z > 0))
    x, aux = jax.jit(hidden(name))(params, text, SEGMENTS)
    close(x, want)
    np.testing.assert_array_equal(aux["recursion"]["selected"], np.stack([a for _, _, a in seen], -1))
    assert aux["loss"] == 0
    share = [1.0, *np.mean(aux["recursion"]["selected"], axis=(0, 1))]
    for r in range(len(free)):
        assert share[r + 1] == share[r] if free[r] else 0 < share[r + 1] < share[r]


@pytest.mark.parametrize("name", [name for name in FAMILY if name.startswith("mor")])
def test_the_families_that_are_tested_leave_some_tokens_out(name):
    graphdef, params = of_families(name)
    selected = jax.jit(lambda p: models.merge(graphdef, p).hidden(tokens(2, 17))[1]["recursion"]["selected"])(params)
    share = np.mean(selected, axis=(0, 1))
    assert 0.1 < share[-1] < 0.9
    assert share[-1] < share[0]


@each
def test_training_looks_at_the_future_and_nothing_else_does(name):
    _, params = built(name)
    text = tokens(2, 13)
    changed = text.at[:, 12].set((text[:, 12] + 1) % V)
    causal, best = (jax.jit(hidden(name, training=training)) for training in (False, True))
    np.testing.assert_array_equal(causal(params, text)[0][:, :12], causal(params, changed)[0][:, :12])
    some = [best(params, text.at[:, 12].set(v))[0][:, :12] for v in range(V)]
    assert any((a != some[0]).any() for a in some)  # the reason why training alone may do so


def test_capacities_of_1_leave_nothing_to_choose():
    """Training is then evaluation, and with a gate that is fixed the stack is a plain one with its layers repeated."""
    config = section(prefix=(ATTENTION,), layers=2, recursion__count=2, recursion__capacities=(1.0, 1.0))
    params = models.init(config, jax.random.key(0))
    text = tokens(2, 9)
    passes = [models.merge(models.abstract(config, training=t)[0], params).hidden(text) for t in (False, True)]
    close(passes[0][0], passes[1][0], 1e-6)
    assert passes[1][1]["loss"] == 0
    params["recursion"]["router"] = jnp.zeros_like(params["recursion"]["router"])
    model = models.merge(models.abstract(config)[0], params)
    positions = jnp.arange(9)[None]
    x = model.prefix["0"](model._embed(text, positions), None, positions)[0]
    block = nnx.merge(*(lambda g, s: (g, jax.tree.map(lambda a: a[0], s)))(*nnx.split(model.period)))["0"]
    for _ in range(2):
        x = x + 0.05 * block(x, None, positions)[0]
    close(model(text), model._logits(model._final(x)))


def test_a_document_goes_on_behind_a_token_that_was_left_out():
    _, params = built("linear")
    text = tokens(2, 13)
    want, aux = jax.jit(hidden("linear"))(params, text, SEGMENTS)
    left_out = np.flatnonzero(aux["recursion"]["selected"][0, 4:12, -1] == 0) + 4
    assert left_out.size
    model = models.merge(*built("linear"))
    for t in left_out[:2]:
        _, state = extend("linear")(params, text[:, : t + 1], start("linear", 2, 13), SEGMENTS[:, : t + 1])
        np.testing.assert_array_equal(state["period"]["document"], [1, 2])
        got, _ = extend("linear")(params, text[:, t + 1 :], state)
        close(got, model._logits(want)[:, t + 1 :])


def test_the_best_of_equal_scores_are_the_first():
    scores = jnp.array([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 5.0]])
    np.testing.assert_array_equal(recursion.best(scores, 3), [[0, 1, 3], [0, 1, 4]])


@each
def test_activations_are_all_layers_of_a_pass(name):
    _, params = built(name)
    spec = resolve(MODELS[name])
    for training in (False, True):
        model = models.merge(models.abstract(MODELS[name], training=training)[0], params)
        seen = model.activations(tokens(2, 7))
        assert seen["blocks"].shape == (len(spec.blocks), 2, 7, 16)
    close(seen["logits"], full(name)(params, tokens(2, 7)))
    assert len(spec.blocks) == {"linear": 8, "uneven": 8, "mor": 6, "mor_moe": 14}[name]


# ------------------------------------------------------------------------------------ counts


def test_counts_by_hand():
    """Width 16, 4 heads and 2 of keys of width 4, F 24, V 23; 1 + 2 x 3 + 1 layers, of which 4 are held; T = 9."""
    attention, mlp, norms = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24, 2 * 16
    counts = flops.counts(LINEAR)
    assert counts.non_embedding == 4 * (attention + mlp + norms) + 16 + 3 * 16
    assert counts.active == counts.total

    def layer(T, square=False):
        """FLOPs of one layer on a row of T tokens."""
        pairs = T * T if square else T * (T + 1) / 2
        return T * 2 * (attention + mlp) + 4 * 16 * pairs

    lengths, competing = (9, 9, 9, 9, 6, 6, 3, 3), 9 + 9 + 6
    found = flops.per_token(LINEAR, 9)
    body = sum(layer(T) for T in lengths) + 2 * 16 * competing
    assert 9 * found.forward_without_unembedding == pytest.approx(body, rel=1e-12)
    assert 9 * found.forward == pytest.approx(body + 9 * 2 * 16 * 23, rel=1e-12)
    square = sum(layer(T, square=True) for T in lengths) + 2 * 16 * competing + 9 * 2 * 16 * 23
    assert 9 * found.matmul_forward == pytest.approx(square, rel=1e-12)
    # Decoding the ninth token: in expectation 1, 2/3 and 1/3 of it, behind as many of the others.
    step = sum(n / 9 * (2 * (attention + mlp) + 4 * 16 * n) for n in lengths)
    assert flops.decode_per_token(LINEAR, 9) == pytest.approx(step + 2 * 16 * competing / 9 + 2 * 16 * 23, rel=1e-12)
    assert flops.state_bytes(LINEAR, 9) == 8 * 9 * 2 * 2 * 4 * 2
    assert flops.weight_products(LINEAR, jax.tree.map(lambda _: True, models.roles(LINEAR))) == pytest.approx(
        2 * (2 + 2 * (1 + 2 / 3 + 1 / 3)) * (attention + mlp) + 2 * 16 * (1 + 1 + 2 / 3) + 2 * 16 * 23, rel=1e-12
    )


def test_capacities_are_rounded_up_and_not_by_a_rounding_error():
    options = resolve(LINEAR).recursion
    for T in range(1, 400):
        assert recursion.kept(options, T) == (T, -(-2 * T // 3), -(-T // 3))


def test_the_published_shape():
    model = override(configs.load("mor:size=360m"), {"model.vocab_size": 49152}).model
    assert flops.counts(model).non_embedding == pytest.approx(118e6, rel=2e-3)
    assert len(resolve(model).blocks) == 32
    plain = override(model, {"recursion.count": 1, "layers": 32})
    assert flops.counts(plain).non_embedding == pytest.approx(315e6, rel=2e-3)
    share = flops.per_token(model, 2048).forward_without_unembedding
    share /= flops.per_token(plain, 2048).forward_without_unembedding
    assert 0.6 < share < (2 + 10 * 2) / 32 + 1e-3  # shorter rows also have fewer pairs


def test_depth_is_that_of_a_pass():
    """CompleteP: 1 + 3 x 3 + 1 layers over a base of 1 + 1 x 3 + 1."""
    config = override(LINEAR, {"layers": 5, "parametrization": "completep", "mup.base_width": 16, "mup.base_layers": 3})
    spec = resolve(config)
    assert spec.depth_ratio == pytest.approx(11 / 5)
    assert (spec.init.layers, spec.init.base_layers) == (11, 5)
    assert [block.layer for block in spec.blocks[:2]] == [0, 1]
    assert spec.suffix[0].layer == 10


BAD = [
    ({"count": 0}, "config.model.recursion.count", "at least 1"),
    ({"alpha": 0.0}, "config.model.recursion.alpha", "above 0"),
    ({"temperature": math.nan}, "config.model.recursion.temperature", "above 0"),
    ({"loss": -1.0}, "config.model.recursion.loss", "at least 0"),
    ({"capacities": (1.0, 0.5, 0.5)}, "config.model.recursion.capacities", "must be 2 shares (recursion.count)"),
    ({"capacities": (0.5, 1.0)}, "config.model.recursion.capacities", "never grow"),
    ({"capacities": (1.0, 0.0)}, "config.model.recursion.capacities", "in (0, 1]"),
    ({"capacities": (1.0, "half")}, "config.model.recursion.capacities", "in (0, 1]"),
]


@pytest.mark.parametrize(("changes", "field", "remedy"), BAD)
def test_bad_options_are_refused(changes, field, remedy):
    config = override(base().model, {"vocab_size": 9, "recursion.count": 2} | {
        f"recursion.{name}": value for name, value in changes.items()})  # fmt: skip
    with pytest.raises(BadInput) as caught:
        models.validate(config)
    assert caught.value.field == field
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blocks": (("mamba", "none"),)}, "config.model.blocks = 'mamba': cannot be shared by recursions"),
        ({"blocks": (("attention", "mlp", {"window": 4}),)}, "window = 4: must be 0 in layers that recursions share"),
        ({"parametrization": "mup", "mup.base_width": 256, "mup.base_layers": 1, "prefix": (ATTENTION,)},
         "mup.base_layers = 1: must be above the 1 layers of prefix and suffix"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_shared_are_refused(changes, says):
    with pytest.raises(BadInput) as caught:
        models.validate(override(base().model, {"vocab_size": 9, "recursion.count": 2} | changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ in training

SMALL = {
    "family": "mor", "model__layers": 3, "model__prefix": (ATTENTION,), "model__recursion__count": 3,
    "model__recursion__capacities": (1.0, 0.6, 0.3), "model__recursion__loss": 0.1,
}  # fmt: skip
MOE = {
    "model__blocks": (("attention", "moe"),), "model__moe__experts": 4, "model__moe__hidden": 8, "model__moe__lbl": 1.0,
    "model__moe__router": "sigmoid", "model__moe__bias_rate": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def one_step(corpus, **changes):
    conf = tiny_config(corpus, **changes)
    opened = data.open(conf.data)
    trainer = update.Trainer(conf, opened)
    rows = sharding.put_rows(next(opened.stream(0, 0)), trainer.mesh)
    with jax.default_matmul_precision("highest"):
        return trainer, rows, *trainer.step(trainer.initial_state(), rows, np.float32(1e-3))


@pytest.mark.parametrize("experts", [{}, MOE], ids=["mlp", "experts"])
def test_accumulation_changes_rounding_only(corpus, experts):
    """Also of the experts' global balance loss, of which every recursion has one, and of their selection bias."""
    results = [one_step(corpus, train__accum_steps=parts, optim__clip=0.0, **SMALL, **experts) for parts in (1, 4)]
    (_, _, state, metrics), (_, _, again, in_parts) = results
    for name, value in metrics["routing"].items():
        assert float(in_parts["routing"][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert float(in_parts["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    if not experts:
        return
    load, blocks = np.asarray(metrics["load"]), state.params["period"]["0"]["channel"]
    assert load.shape == (2 * 3, 4)  # two shared layers in three recursions
    of_layer = sum(np.asarray(share) * c for share, c in zip(load.reshape(3, 2, 4), (1, 10 / 16, 5 / 16), strict=True))
    sign = np.sign(of_layer.mean(1, keepdims=True) - of_layer)
    np.testing.assert_allclose(blocks["bias"], 0.01 * sign, atol=1e-8)
    np.testing.assert_array_equal(blocks["bias"], again.params["period"]["0"]["channel"]["bias"])


def test_what_is_logged_of_a_step_is_what_was_selected(corpus):
    trainer, rows, _, metrics = one_step(corpus, **SMALL)
    nll = update.make_nll(trainer.config, trainer.model, trainer.config.model.vocab_size or 256, training=True)
    counters = nll(trainer.initial_state().params, rows)[2]["recursion"]
    routing = {name: float(value) for name, value in metrics["routing"].items()}
    assert set(routing) == {"selected_1", "selected_2", "selected_3"} | {
        f"{name}_{r}" for name in ("threshold", "accuracy", "bce") for r in (2, 3)}  # fmt: skip
    assert [routing[f"selected_{r}"] for r in (1, 2, 3)] == pytest.approx([1, 10 / 16, 5 / 16])
    loss = 0.1 * (routing["bce_2"] + routing["bce_3"])
    assert float(counters["loss"]) == pytest.approx(loss, rel=1e-4)
    for r, of in ((2, 1.0), (3, 10 / 16)):
        # Those on which the two differ are at least the difference of their numbers.
        apart = abs(routing[f"threshold_{r}"] - routing[f"selected_{r}"]) / of
        assert apart <= 1 - routing[f"accuracy_{r}"] + 1e-6 <= 1


def test_the_record_says_what_training_and_evaluation_selected(corpus, tmp_path):
    record = train.run(tiny_spec(corpus, **SMALL), tmp_path)
    lines = records.read_metrics(tmp_path / record.id)
    assert record.routing["accuracy_3"] == pytest.approx(
        np.mean([line["routing"]["accuracy_3"] for line in lines[-4:]])
    )
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    assert len(held_out) == 4
    for found in held_out:
        assert found["selected"] == found["sources"]["text"]["selected"]
        assert found["selected"][0] == 1
        assert 1 >= found["selected"][1] >= found["selected"][2] >= 0
    assert record.routing["held_out_selected"] == held_out[-1]["selected"]
    assert "load" not in record.routing
    assert record.routing["bce_2"] < lines[0]["routing"]["bce_2"]
