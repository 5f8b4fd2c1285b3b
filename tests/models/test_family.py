"""What every family owes: one model in full passes, in steps and in any split; no leaks; exact counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import close, forms, tokens
from family import FAMILY, PIECEWISE, V

from scalelab import flops, models
from scalelab.parametrization import ROLES

# What others hold together is left out of the fast tests.
COMPOSED = (
    "xlstm_paper",
    "mor_parscale",
    "mor_moe",
    "moe_capacity",
    "moe_parscale",
    "gla_conv",
    "delta_hybrid",
    "lightning_hybrid",
)
HEAVIEST = ("mor_moe", "delta_hybrid")  # of which other tests hold the parts together
ON_NEWEST = ("mamba2", "xlstm", "moe", "hybrid")  # one of every kind of state


def marks(name):
    study, slow, once = name in HEAVIEST, name in COMPOSED, name not in ON_NEWEST
    kinds = [(pytest.mark.study, study), (pytest.mark.slow, slow), (pytest.mark.once, once)]
    return [mark for mark, holds in kinds if holds]


NAMES = {name: pytest.param(name, marks=marks(name)) for name in FAMILY}
each = pytest.mark.parametrize("name", NAMES.values())


built, full, extend, start = forms(FAMILY)


def loss_of(graphdef, text, segments=None):
    def loss(params):
        nll, _, aux = models.merge(graphdef, params).nll(text[:, :-1], text[:, 1:], segments)
        return jnp.mean(nll) + aux["loss"]

    return loss


@each
def test_steps_and_lengths_equal_the_full_pass(name):
    graphdef, params = built(name)
    step = jax.jit(lambda p, t, state: models.merge(graphdef, p).step(t, state))
    text, state = tokens(2, 17), start(name, 2, 17)
    want = full(name)(params, text)
    for t in range(17):
        logits, state = step(params, text[:, t], state)
        close(logits, want[:, t])
    for T in (1, 2, 3, 5):  # shorter than the convolution and than a chunk, and no multiple of it
        close(full(name)(params, text[:, :T]), want[:, :T])


@pytest.mark.once
@each
def test_any_split_with_carried_state_equals_the_full_pass(name):
    _, params = built(name)
    text = tokens(2, 13)
    segments = jnp.array([[0] * 3 + [1] * 10, [2] * 8 + [5] * 5])
    want = full(name)(params, text, segments)
    for cuts in ((1, 4), (8,)):
        state, parts = start(name, 2, 13), []
        for a, b in zip((0, *cuts), (*cuts, 13), strict=True):
            logits, state = extend(name)(params, text[:, a:b], state, segments[:, a:b])
            parts.append(logits)
        close(jnp.concatenate(parts, axis=1), want)
    _, state = extend(name)(params, text[:, :9], start(name, 2, 13), segments[:, :9])
    close(extend(name)(params, text[:, 9:], state)[0], want[:, 9:])  # goes on in the last document


@each
def test_neither_the_future_nor_other_rows_nor_other_documents_leak(name):
    _, params = built(name)
    text = tokens(2, 11)
    before = full(name)(params, text)
    after = full(name)(params, text.at[:, 6].set((text[:, 6] + 1) % V))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])  # bit for bit
    assert (before[:, 6:] != after[:, 6:]).any(axis=(0, 2)).all()
    np.testing.assert_array_equal(before[1:], full(name)(params, text.at[0].set(0))[1:])
    segments = jnp.array([[1] * 6 + [2] * 5] * 2)
    positions = jnp.array([[*range(6), *range(5)]])  # prefixes are not rotated: they see where a document begins
    packed = full(name)(params, text, segments, positions)
    close(packed[:, :6], full(name)(params, text[:, :6]))
    close(packed[:, 6:], full(name)(params, text[:, 6:]))


@each
def test_remat_vmap_and_bfloat16(name):
    graphdef, params = built(name)
    text = tokens(3, 14)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(graphdef, text)))(params)
    config = FAMILY[name].copy_and_resolve_references()
    config.remat = "full"
    again = jax.jit(jax.value_and_grad(loss_of(models.abstract(config)[0], text)))(params)
    jax.tree.map(close, again, (loss, gradient))
    two = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), params)
    losses = jax.jit(jax.vmap(loss_of(graphdef, text)))(two)
    close(losses[0], loss)
    config.compute_dtype, config.remat = "bfloat16", "none"
    low, gradient = jax.jit(jax.value_and_grad(loss_of(models.abstract(config)[0], text)))(params)
    assert abs(low - loss) < 0.03 * loss  # a hundredth of bfloat16 in each product, through stirred layers
    assert all(a.dtype == jnp.float32 and jnp.isfinite(a).all() for a in jax.tree.leaves(gradient))


def in_training(name):
    """(a loss in bfloat16, the same as in training, parameters)."""
    config = FAMILY[name].copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    return *(loss_of(models.abstract(config, training=on)[0], tokens(2, 9)) for on in (False, True)), built(name)[1]


@pytest.mark.parametrize("name", FAMILY)
def test_training_in_bfloat16_casts_nothing_that_is_read_in_float32(name):
    _, training, params = in_training(name)
    jax.eval_shape(jax.grad(training), params)  # `Part.exact` would refuse


@pytest.mark.once
@pytest.mark.parametrize("name", ["moe", "xlstm_paper"])
def test_training_in_bfloat16_has_the_gradients_of_other_passes(name):
    """Though it casts matrices before they are cut into layers."""
    other, training, params = in_training(name)
    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(jax.grad(f))(params) for f in (training, other)))


@pytest.mark.once
@pytest.mark.parametrize("name", [NAMES[name] for name in FAMILY if name not in PIECEWISE])
def test_gradient_by_finite_differences(name):
    graphdef, params = built(name)
    loss = jax.jit(loss_of(graphdef, tokens(3, 12)))
    gradient = jax.jit(jax.grad(loss_of(graphdef, tokens(3, 12))))(params)
    roles = models.roles(FAMILY[name])
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a, role: np.float32(rng.normal(size=a.shape)) * (role != "buffer"), params, roles)
    h = 1e-4
    at = {n: float(loss(jax.tree.map(lambda a, d, n=n: a + n * h * d, params, direction))) for n in (-2, -1, 1, 2)}
    numeric = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    exact = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert float(exact) == pytest.approx(numeric, rel=3e-3, abs=1e-2)


@each
def test_counts_products_and_states(name):
    config = FAMILY[name]
    graphdef, shapes = models.abstract(config)
    roles = models.roles(config)
    assert jax.tree.structure(roles) == jax.tree.structure(shapes)
    assert set(jax.tree.leaves(roles)) <= set(ROLES)
    sizes = jax.tree.map(lambda a, role: a.size * (role != "buffer"), shapes, roles)
    assert flops.counts(config).total == sum(jax.tree.leaves(sizes))
    # What is counted of recursions is training, where they leave tokens out.
    run, _ = models.abstract(config, training=config.recursion.count > 1)
    for T in (1, 6, 9):
        text = jax.ShapeDtypeStruct((2, T), jnp.int32)
        want = round(2 * T * flops.per_token(config, T, batch=2).matmul_forward)
        assert flops.jaxpr_matmul_flops(lambda p, t: models.merge(run, p)(t), shapes, text) == want
    state = jax.eval_shape(lambda p: models.merge(graphdef, p).init_state(1, 7), shapes)
    held = [
        leaf.size * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert flops.state_bytes(config, 7, dtype_bytes=4) == sum(held)
