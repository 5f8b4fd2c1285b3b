import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr

from pallas_kernels import dispatch
from pallas_kernels.cross_entropy import cross_entropy, reference


def problem(n, d, v, seed=0, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    labels = jnp.asarray(rng.integers(-1, v, n))  # about one in v + 1 is left out
    return (scale * normal(n, d)).astype(dtype), normal(d, v), labels, (normal(n), normal(n))


def values_and_gradients(f, x, w, cotangents):
    @jax.jit
    def both(x, w, cotangents):
        out, pull = jax.vjp(f, x, w)
        return (*out, *pull(cotangents))

    return both(x, w, cotangents)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    v=st.integers(1, 33),
    chunk=st.integers(1, 50),
    cap=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference_in_value_and_gradient(n, d, v, chunk, cap, seed):
    x, w, labels, cotangents = problem(n, d, v, seed)
    got = values_and_gradients(lambda x, w: cross_entropy(x, w, labels, cap=cap, chunk=chunk), x, w, cotangents)
    want = values_and_gradients(lambda x, w: reference.cross_entropy(x, w, labels, cap), x, w, cotangents)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_extreme_logits_stay_finite_and_right():
    x, w, labels, cotangents = problem(17, 8, 20, scale=1e4)
    got = values_and_gradients(lambda x, w: cross_entropy(x, w, labels, chunk=5), x, w, cotangents)
    want = values_and_gradients(lambda x, w: reference.cross_entropy(x, w, labels), x, w, cotangents)
    for a, b in zip(got, want, strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_one_pass_over_the_logits_finds_what_two_find(monkeypatch, scale):
    """As accelerators run it; where all logits are equal and where one stands out."""
    x, w, labels, cotangents = problem(17, 8, 200, scale=scale)
    x = x.at[3].set(0.0)
    want = values_and_gradients(lambda x, w: cross_entropy(x, w, labels, chunk=5), x, w, cotangents)
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "one", "9.0"))
    run = jax.jit(lambda x, w: cross_entropy(x, w, labels, chunk=5))
    assert "reduce_max" not in str(jax.make_jaxpr(run)(x, w))
    got = values_and_gradients(lambda x, w: cross_entropy(x, w, labels, chunk=5), x, w, cotangents)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5 * scale)


@pytest.mark.parametrize("n", [8, 13])
def test_rows_left_out_have_no_value_and_no_gradient(n):
    x, w, labels, cotangents = problem(n, 4, 6, scale=1e4)  # so large that a slip would overflow
    labels = labels.at[::2].set(-1)
    nll, lse, dx, dw = values_and_gradients(lambda x, w: cross_entropy(x, w, labels, chunk=3), x, w, cotangents)
    gone = labels < 0
    assert not nll[gone].any()
    assert not lse[gone].any()
    assert not dx[gone].any()
    kept = ~gone

    def f(x, w):
        return cross_entropy(x, w, labels[kept], chunk=3)

    _, _, _, dw_kept = values_and_gradients(f, x[kept], w, tuple(c[kept] for c in cotangents))
    # Logits of 1e4 are rounded to about 1e-3, differently where rows stand in other chunks; a slip would be of order 1.
    np.testing.assert_allclose(dw, dw_kept, rtol=2e-3)


def test_bfloat16_within_rounding_of_float32():
    x, w, labels, cotangents = problem(64, 32, 50, dtype=jnp.bfloat16)
    got = values_and_gradients(lambda x, w: cross_entropy(x, w, labels, chunk=16), x, w, cotangents)
    w_rounded = w.astype(jnp.bfloat16).astype(jnp.float32)

    def f(x, w):
        return reference.cross_entropy(x, w, labels)

    want = values_and_gradients(f, x.astype(jnp.float32), w_rounded, cotangents)
    assert [a.dtype for a in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    for a, b, tolerance in zip(got, want, (1e-4, 1e-4, 2e-2, 2e-2), strict=True):
        error = jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
        assert error < tolerance


def test_finite_differences():
    x, w, labels, (a, b) = problem(7, 3, 5)
    cap, step = 2.0, 1e-5

    def loss(w):
        """From the definition, in float64."""
        z = cap * np.tanh(np.float64(x) @ w / cap)
        lse = np.log(np.exp(z).sum(-1))
        nll = lse - z[np.arange(7), np.asarray(labels)]
        return np.where(labels < 0, 0, np.asarray(a) * nll + np.asarray(b) * lse**2).sum()

    def chunked(w):
        nll, lse = cross_entropy(x, w, labels, cap=cap, chunk=3)
        return jnp.sum(a * nll + b * lse**2)

    w = np.float64(w)
    direction = np.random.default_rng(9).normal(size=w.shape)
    numeric = (loss(w + step * direction) - loss(w - step * direction)) / (2 * step)
    gradient = np.asarray(jax.jit(jax.grad(chunked))(jnp.float32(w)), np.float64)
    np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-4)


def shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from shapes(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("n", [64, 67])
def test_never_holds_all_logits(n):
    v, chunk = 41, 16
    x, w, labels, cotangents = problem(n, 8, v)

    def f(x, w):
        return values_and_gradients(lambda x, w: cross_entropy(x, w, labels, chunk=chunk), x, w, cotangents)

    rows = {shape[0] for shape in shapes(jax.make_jaxpr(f)(x, w).jaxpr) if len(shape) == 2 and shape[1] == v}
    assert rows - {8}
    assert max(rows) <= chunk

    def g(x, w):
        return values_and_gradients(lambda x, w: reference.cross_entropy(x, w, labels), x, w, cotangents)

    assert (n, v) in set(shapes(jax.make_jaxpr(g)(x, w).jaxpr))  # the check sees what it should


def test_under_jit_vmap_and_remat():
    x, w, labels, _ = problem(12, 4, 9)
    xs, ws, ys = (jnp.stack([a, a[::-1], a]) for a in (x, w, labels))

    def loss(x, w, y):
        nll, lse = cross_entropy(x, w, y, chunk=5)
        return jnp.mean(nll + 1e-2 * lse**2)

    want = [jax.jit(jax.grad(loss, (0, 1)))(x, w, y) for x, w, y in zip(xs, ws, ys, strict=True)]
    got = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1))))(xs, ws, ys)
    for i, pair in enumerate(want):
        for a, b in zip(got, pair, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
