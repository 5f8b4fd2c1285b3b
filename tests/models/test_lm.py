from functools import partial

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import close as within
from built import forms, tokens
from family import V
from flax import nnx

from scalelab import models
from scalelab.errors import BadInput

section = partial(family.section, layers=3, loss_chunk=5)
LOCAL = ("attention", "mlp", {"window": 4})
MODELS = {
    "windows": section(
        prefix=(("attention", "none"),), blocks=(LOCAL, ("attention", "mlp")), layers=5, placement="out"
    ),
    "gemma": section(
        placement="peri",
        embed_norm=True,
        logit_cap=5.0,
        attention__soft_cap=3.0,
        attention__qk_norm=True,
        attention__window=3,
        tied_embeddings=False,
    ),
    "gpt2": section(
        suffix=(("attention", "mlp"),),
        positions=11,
        norm="layernorm",
        attention__bias=True,
        mlp__bias=True,
        mlp__kind="gelu",
        attention__rope_theta=0.0,
        attention__kv_heads=4,
    ),
    "olmo2": section(placement="out", attention__qk_norm=True, attention__qk_norm_full=True, attention__qkv_bias=True),
}
each = pytest.mark.parametrize("name", MODELS)


built, full, extend, start = forms(MODELS)
close = partial(within, tolerance=1e-5)


# ------------------------------------------------------------------------------------ forms that must agree


@each
def test_step_by_step_equals_the_full_pass(name):
    graphdef, params = built(name)
    step = jax.jit(lambda p, t, state: models.merge(graphdef, p).step(t, state))
    text, state = tokens(2, 11), start(name, 2, 11)
    want = full(name)(params, text)
    for t in range(11):
        logits, state = step(params, text[:, t], state)
        close(logits, want[:, t])
    assert int(state["length"]) == 11


@pytest.mark.parametrize("T", [1, 3, 4, 5])  # around the window of 4
def test_awkward_lengths(T):
    _, params = built("windows")
    text = tokens(2, 11)
    close(full("windows")(params, text[:, :T]), full("windows")(params, text)[:, :T])


@pytest.mark.once
@pytest.mark.parametrize(("name", "cuts"), [("windows", (1, 4)), ("windows", (7,)), ("gemma", (7,)), ("gpt2", (7,))])
def test_any_split_with_carried_state_equals_the_full_pass(name, cuts):
    _, params = built(name)
    text = tokens(2, 10)
    segments = jnp.array([[0] * 3 + [1] * 7, [2] * 8 + [5] * 2])
    state, parts = start(name, 2, 10), []
    for a, b in zip((0, *cuts), (*cuts, 10), strict=True):
        logits, state = extend(name)(params, text[:, a:b], state, segments[:, a:b])
        parts.append(logits)
    close(jnp.concatenate(parts, axis=1), full(name)(params, text, segments))


def test_decoding_goes_on_in_the_last_document():
    _, params = built("gpt2")
    text, segments = tokens(2, 10), jnp.array([[0] * 3 + [1] * 7, [2] * 6 + [5] * 4])
    _, state = extend("gpt2")(params, text[:, :7], start("gpt2", 2, 10), segments[:, :7])
    got, _ = extend("gpt2")(params, text[:, 7:], state)
    close(got, full("gpt2")(params, text, segments)[:, 7:])


@each
def test_the_future_does_not_reach_the_past(name):
    _, params = built(name)
    text = tokens(2, 9)
    before = full(name)(params, text)
    for t in (1, 8):
        after = full(name)(params, text.at[:, t].set((text[:, t] + 1) % V))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])  # bit for bit
        assert (before[:, t] != after[:, t]).any()


def test_no_gradient_from_the_future():
    graphdef, params = built("windows")
    model = models.merge(graphdef, params)

    def output(x):
        rows = None, jnp.arange(8)[None]
        return model._stack(x, rows, None, lambda block, x, rows, _: block(x, *rows))[0][0, 4].sum()

    gradient = jax.jit(jax.grad(output))(jax.random.normal(jax.random.key(0), (1, 8, 16)))
    assert not gradient[:, 5:].any()
    assert gradient[:, :5].any(axis=-1).all()


@each
def test_rows_of_a_batch_do_not_see_each_other(name):
    _, params = built(name)
    text = tokens(3, 9)
    np.testing.assert_array_equal(full(name)(params, text)[1:], full(name)(params, text.at[0].set(0))[1:])


@pytest.mark.once
@each
def test_packed_documents_equal_the_documents_alone(name):
    _, params = built(name)
    a, b = tokens(1, 6, 1), tokens(1, 5, 2)
    packed, segments = jnp.concatenate([a, b], axis=1), jnp.array([[1] * 6 + [2] * 5])
    got = full(name)(params, packed, segments)
    close(got[:, :6], full(name)(params, a))
    positions = jnp.array([[*range(6), *range(5)]])
    if MODELS[name].positions:  # they count from the start of the row, unless told otherwise
        got = full(name)(params, packed, segments, positions)
    close(got[:, 6:], full(name)(params, b))  # rotary positions are relative, so its offset does not matter
    close(full(name)(params, packed, segments, positions), got)


def test_learned_positions_are_added_and_have_an_end():
    graphdef, params = built("gpt2")
    model, text = models.merge(graphdef, params), tokens(1, 12)
    want = params["embed"][text[:, :3]] + params["positions"][:3]
    np.testing.assert_array_equal(model._embed(text[:, :3], jnp.arange(3)[None]), want)
    for run in (lambda: model(text), lambda: model.init_state(1, 12)):
        with pytest.raises(BadInput, match=r"config\.model\.positions = 11: is too few for 12 tokens"):
            run()


@pytest.mark.once
def test_qk_norm_over_all_heads_by_hand():
    graphdef, params = built("olmo2")
    layer = jax.tree.map(lambda a: a[0], params["period"]["0"]["mixer"])
    blocks, stacked = nnx.split(models.merge(graphdef, params).period)
    mixer = nnx.merge(blocks, jax.tree.map(lambda a: a[0], stacked))["0"].mixer
    assert {name: layer[name].shape for name in ("q_norm", "k_norm", "q_bias")} == {
        "q_norm": (16,), "k_norm": (8,), "q_bias": (4, 4),
    }  # fmt: skip
    assert "out_bias" not in layer
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 4))
    flat = np.asarray(x).reshape(2, 5, 16)
    want = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(layer["q_norm"])
    close(mixer._qk_norm(x, "q_norm"), want.reshape(x.shape))


# ------------------------------------------------------------------------------------ the loss


@pytest.mark.once
@each
def test_nll_is_that_of_the_logits(name):
    graphdef, params = built(name)
    inputs, targets = tokens(2, 9), tokens(2, 9, 3).at[0, 4:6].set(-1)
    nll, lse, aux = jax.jit(lambda p: models.merge(graphdef, p).nll(inputs, targets))(params)
    logits = full(name)(params, inputs)
    assert logits.dtype == nll.dtype == lse.dtype == jnp.float32
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    close(nll, jnp.where(targets < 0, 0, want))
    close(lse, jnp.where(targets < 0, 0, jax.nn.logsumexp(logits, axis=-1)))
    assert aux["loss"] == 0
    close(jax.jit(lambda p: models.logits(MODELS[name], p, inputs))(params), logits)


def loss_of(graphdef):
    def loss(params, text):
        nll, lse, aux = models.merge(graphdef, params).nll(text[:, :-1], text[:, 1:])
        return jnp.mean(nll) + 1e-4 * jnp.mean(lse**2) + aux["loss"]

    return loss


def moved(h, start, direction):
    return start + h * direction


@pytest.mark.once
def test_gradient_by_finite_differences():
    graphdef, params = built("gemma")
    loss, text = jax.jit(loss_of(graphdef)), tokens(4, 12)
    gradient = jax.jit(jax.grad(loss_of(graphdef)))(params, text)
    leaves, tree = jax.tree.flatten(params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = tree.unflatten([np.float32(rng.normal(size=a.shape)) for a in leaves])

        h = 5e-4
        at = {n: float(loss(jax.tree.map(partial(moved, n * h), params, direction), text)) for n in (-2, -1, 1, 2)}
        numeric = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
        exact = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        assert float(exact) == pytest.approx(numeric, rel=3e-3, abs=3e-3)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat):
    name = "gpt2"
    graphdef, params = built(name)
    config = MODELS[name].copy_and_resolve_references()
    config.remat = remat
    again, _ = models.abstract(config)
    text = tokens(2, 8)

    def run(g):
        return jax.jit(jax.value_and_grad(loss_of(g)))(params, text)

    jax.tree.map(close, run(again), run(graphdef))
    assert str(jax.make_jaxpr(jax.grad(loss_of(again)))(params, text)) != str(
        jax.make_jaxpr(jax.grad(loss_of(graphdef)))(params, text)
    )


def test_a_scanned_stack_equals_its_blocks_one_by_one():
    graphdef, _ = models.abstract(section())
    params = jax.jit(lambda key: models.init(section(), key))(jax.random.key(0))

    def run(g, p):
        return jax.jit(lambda p: models.merge(g, p)(tokens(2, 8)))(p)

    period = params["period"]["0"]

    def one(i):
        return jax.tree.map(lambda a: a[i], period)

    blocks = {"blocks": (("attention", "mlp"),), "prefix": (("attention", "mlp"),), "suffix": (("attention", "mlp"),)}
    other, shapes = models.abstract(section(**blocks))
    unrolled = {
        **params,
        "prefix": {"0": one(0)},
        "period": {"0": jax.tree.map(lambda a: a[1:2], period)},
        "suffix": {"0": one(2)},
    }
    assert jax.tree.map(jnp.shape, unrolled) == jax.tree.map(jnp.shape, shapes)
    close(run(other, unrolled), run(graphdef, params))


def test_the_program_does_not_grow_with_depth():
    def lines(layers):
        graphdef, params = models.abstract(section(layers=layers))
        text = jax.ShapeDtypeStruct((2, 9), jnp.int32)
        return str(jax.make_jaxpr(jax.grad(loss_of(graphdef)))(params, text)).count("\n")

    assert lines(24) == lines(2)


@pytest.mark.slow
def test_a_population_under_vmap_equals_its_members():
    config = MODELS["windows"]
    graphdef, _ = built("windows")
    keys, text = jax.random.split(jax.random.key(0), 3), tokens(2, 8)

    def init(key):
        return models.init(config, key)

    population = jax.jit(jax.vmap(init))(keys)
    run = jax.value_and_grad(loss_of(graphdef))
    losses, gradients = jax.jit(jax.vmap(run, in_axes=(0, None)))(population, text)
    one = jax.jit(lambda key: run(init(key), text))
    for i in range(3):
        loss, gradient = one(keys[i])
        close(losses[i], loss)
        jax.tree.map(lambda a, b, i=i: close(a[i], b), gradients, gradient)


def test_bfloat16_is_finite_and_near():
    name = "gemma"
    _, params = built(name)
    config = MODELS[name].copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    graphdef, _ = models.abstract(config)
    text = tokens(4, 16)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(graphdef)))(params, text)
    exact = jax.jit(loss_of(built(name)[0]))(params, text)
    assert abs(loss - exact) < 0.03
    assert all(a.dtype == jnp.float32 and jnp.isfinite(a).all() for a in jax.tree.leaves(gradient))
    logits = jax.eval_shape(lambda p: models.merge(graphdef, p)(text), params)
    assert logits.dtype == jnp.float32


# ------------------------------------------------------------------------------------ the faces of a model


@each
def test_abstract_init_build_and_roles_have_one_tree(name):
    config = MODELS[name]
    graphdef, shapes = models.abstract(config)
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(3))
    built_graphdef, built_params = models.split(models.build(config, nnx.Rngs(jax.random.key(3))))
    assert graphdef == built_graphdef
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    jax.tree.map(close, params, built_params)
    assert jax.tree.structure(models.roles(config)) == jax.tree.structure(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.once
@pytest.mark.parametrize("placement", ["pre", "post", "peri", "out"])
def test_placements_by_hand(placement):
    """One layer, written out."""
    config = section(placement=placement, layers=1, blocks=(("attention", "none"),), tied_embeddings=False)
    graphdef, _ = models.abstract(config)
    text, positions = tokens(2, 5), jnp.arange(5)[None]

    def by_hand(params):
        model = models.merge(graphdef, params)
        blocks, stacked = nnx.split(model.period)
        block = nnx.merge(blocks, jax.tree.map(lambda a: a[0], stacked))["0"]

        def f(x):
            return block.mixer(x, None, positions)[0]

        n = block.mixer_norms
        x = model.embed[...][text]
        if placement == "pre":
            return model.final_norm(x + f(n["norm"](x)))
        if placement == "post":
            return n["norm"](x + f(x))
        if placement == "peri":
            return model.final_norm(x + n["norm_out"](f(n["norm"](x))))
        return model.final_norm(x + n["norm_out"](f(x)))

    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    assert ("final_norm" in params) == (placement != "post")
    hidden = jax.jit(lambda p: models.merge(graphdef, p).hidden(text)[0])
    close(hidden(params), jax.jit(by_hand)(params))
