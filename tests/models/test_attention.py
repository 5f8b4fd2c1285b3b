import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.xla import attend
from scalelab.config import base, override
from scalelab.models.attention import Attention
from scalelab.models.layers import layer_norm, rms_norm, rope
from scalelab.models.registry import resolve


def naive(q, k, v, mask, cap):
    """Head by head, key-value heads repeated, softmax by jax.nn."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, repeat, axis=2) for a in (k, v))
    out = []
    for h in range(q.shape[2]):
        scores = q[:, :, h] @ k[:, :, h].mT / np.sqrt(q.shape[-1])
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        out.append(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1) @ v[:, :, h])
    return jnp.stack(out, axis=2)


def window_mask(T, window):
    """Token t sees max(0, t - w + 1) .. t."""
    return np.array([[max(0, t - window + 1) <= s <= t if window else s <= t for s in range(T)] for t in range(T)])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_equals_the_naive_form_in_value_and_gradient(heads, kv_heads, cap):
    rng = np.random.default_rng(heads)
    B, T, d = 2, 7, 4
    q, cotangent = (jnp.float32(rng.normal(size=(B, T, heads, d))) for _ in range(2))
    k, v = (jnp.float32(3 * rng.normal(size=(B, T, kv_heads, d))) for _ in range(2))
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2], [0] * 7])
    mask = window_mask(T, 3)[None] & (segments[:, :, None] == segments[:, None, :])

    def run(f):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(cotangent)

    got = jax.jit(lambda: run(lambda *a: attend(*a, mask, cap)))()
    want = jax.jit(lambda: run(lambda *a: naive(*a, mask, cap)))()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_within_rounding_of_float32():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (2, 33, 2, 16)) for key in keys)
    mask = jnp.tril(jnp.ones((33, 33), bool))[None]

    def run(dtype):
        out, pull = jax.vjp(lambda *a: attend(*a, mask), *(a.astype(dtype) for a in (q, k, v)))
        return [a.astype(jnp.float32) for a in (out, *pull(cotangent.astype(dtype)))]

    run = jax.jit(run, static_argnums=0)

    for a, b in zip(run(jnp.bfloat16), run(jnp.float32), strict=True):
        assert jnp.linalg.norm(a - b) < 1e-2 * jnp.linalg.norm(b)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 9])
def test_window_mask_token_by_token(window):
    """Which inputs move which outputs, found by derivatives of the whole layer."""
    changes = {"heads": 2, "kv_heads": 1, "head_dim": 4, "window": window}
    config = override(base(), {f"model.attention.{name}": value for name, value in changes.items()})
    config = override(config, {"model.vocab_size": 5, "model.width": 8, "model.compute_dtype": "float32"}).model
    spec = resolve(config)
    draw = spec.init.source(jax.random.key(0), 8 * 4 * (2 + 1 + 1 + 2))
    layer = Attention(spec, spec.period[0].mixer_options, draw)
    x = jnp.float32(np.random.default_rng(1).normal(size=(1, 7, 8)))
    jacobian = jax.jit(jax.jacrev(lambda x: layer(x, None, jnp.arange(7)[None])[0]))(x)
    moved = np.abs(jacobian[0, :, :, 0]).max(axis=(1, 3)) > 0
    np.testing.assert_array_equal(moved, window_mask(7, window))


def test_rope_is_a_rotation_of_halves_and_relative():
    d, theta = 6, 100.0
    x, y = (jax.random.normal(jax.random.key(i), (1, 1, 1, d)) for i in range(2))

    def at(a, position):
        return rope(a, jnp.array([[position]]), theta)[0, 0, 0]

    for j in range(d // 2):
        angle = 5 * theta ** (-2 * j / d)
        a, b = x[0, 0, 0, j], x[0, 0, 0, j + d // 2]
        np.testing.assert_allclose(at(x, 5)[j], a * np.cos(angle) - b * np.sin(angle), rtol=1e-5)
        np.testing.assert_allclose(at(x, 5)[j + d // 2], b * np.cos(angle) + a * np.sin(angle), rtol=1e-5)
    np.testing.assert_allclose(at(x, 0), x[0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(at(x, 9) @ at(y, 4), at(x, 5) @ at(y, 0), rtol=1e-4)


def test_norms_by_definition_also_far_from_zero():
    x = 1e3 + np.random.default_rng(0).normal(size=(3, 16))  # where E[x^2] - E[x]^2 would lose its digits
    scale, bias, eps = np.linspace(0.5, 2, 16), np.linspace(-1, 1, 16), 1e-5

    def f32(a):
        return jnp.asarray(a, jnp.float32)

    x64 = np.asarray(f32(x), np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + eps) * scale + bias
    np.testing.assert_allclose(layer_norm(f32(x), f32(scale), f32(bias), eps), want, atol=1e-3)
    want = scale * x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(rms_norm(f32(x), f32(scale), eps), want, rtol=1e-5)
