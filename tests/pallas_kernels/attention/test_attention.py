"""Every form of attention against the definition; those for accelerators interpreted, lowered, or refusing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import attention, cached, cudnn, reference, splash
from tests.pallas_kernels.kernel_checks import exported


def inputs(T, K=None, H=4, Hk=2, d=8, B=2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, d), (B, K or T, Hk, d), (B, K or T, Hk, d)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(T, B=2):
    return jnp.cumsum(jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.1), axis=1)


def both(f, arrays, seed=2):
    """Values and gradients under a random cotangent."""
    out, pull = jax.vjp(f, *arrays)
    cotangent = jnp.asarray(np.random.default_rng(seed).normal(size=out.shape), out.dtype)
    return [np.asarray(a, np.float32) for a in (out, *pull(cotangent))]


CASES = [
    (1, 1, 0, 0.0, False),
    (64, 64, 0, 0.0, False),
    (7, 9, 0, 0.0, True),
    (12, 12, 3, 0.0, True),
    (9, 12, 4, 5.0, False),
]


@pytest.mark.parametrize(("T", "K", "window", "cap", "packed"), CASES)
def test_the_plain_form_equals_the_definition(T, K, window, cap, packed):
    ids = documents(T) if packed else None
    run = partial(attention, segment_ids=ids, window=window, cap=cap, scale=0.3)
    got = both(jax.jit(partial(run, kernels="xla")), inputs(T, K))
    want = both(jax.jit(partial(run, kernels="reference")), inputs(T, K))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("window", "cap", "packed", "Hk"), [(0, 0.0, True, 2), (50, 20.0, False, 4)])
def test_splash_attention_interpreted_equals_the_definition(window, cap, packed, Hk):
    T = 256
    ids = documents(T) if packed else None
    run = partial(attention, segment_ids=ids, window=window, cap=cap)
    arrays = inputs(T, d=16, Hk=Hk, B=1 if not packed else 2)
    with dispatch.interpreted():
        got = both(partial(run, kernels="splash"), arrays)
    want = both(jax.jit(partial(run, kernels="reference")), arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [64, 128])
def test_splash_attention_lowers_for_a_tpu_at_training_shapes(d):
    q, k, v = (jax.ShapeDtypeStruct((2, 2048, heads, d), jnp.bfloat16) for heads in (8, 4, 4))
    ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, ids, kernels="splash").astype(jnp.float32))

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = exported(step, (q, k, v, ids), "tpu")
    assert text.count("tpu_custom_call") >= 3  # forward, dq, dkv


def test_a_prompt_over_a_cache_warns_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA H100", "9.0"))
    mask = jnp.ones((1, 8, 8), bool)
    with pytest.warns(dispatch.Fallback, match="attention over a cache runs as plain XLA"):
        cached(*inputs(8), mask)
    cached(*inputs(1, 8), mask[:, :1])  # one token: nothing is faster


def test_what_does_not_fit_is_refused_with_its_reason(monkeypatch):
    q, k, _ = inputs(8)
    assert "float32" in cudnn.refusal(q, k, 0.0)
    half = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    assert cudnn.refusal(*half, 0.0) == ""
    assert "soft cap" in cudnn.refusal(*half, 30.0)
    assert "head widths" in cudnn.refusal(*(jnp.pad(a, [(0, 0)] * 3 + [(0, 3)]) for a in half), 0.0)
    assert "multiples of 128" in splash.refusal(q, k)
    assert "an even number of keys before" in cudnn.refusal(*(a.astype(jnp.bfloat16) for a in inputs(9, 12)[:2]), 0.0)
    assert cudnn.refusal(*(a.astype(jnp.bfloat16) for a in inputs(9, 11)[:2]), 0.0) == ""
    wide = [a.astype(jnp.bfloat16) for a in inputs(8, d=192)[:2]]
    assert cudnn.refusal(*wide, 0.0) == ""
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA A100", "8.0"))
    assert "up to 128, not 192" in cudnn.refusal(*wide, 0.0)
    with pytest.raises(dispatch.Unsupported, match="attention: kernels = 'splash' does not run: takes lengths"):
        attention(*inputs(8), kernels="splash")
    with pytest.raises(ValueError, match="must be one of auto"):
        attention(*inputs(8), kernels="triton")


def test_the_mask_that_cudnn_gets_is_the_definitions():
    """cuDNN itself runs on a GPU alone; what it is asked for is compared through `jax.nn`'s plain form."""
    asked = {}

    def plain(*arrays, implementation, **options):
        asked["implementation"] = implementation
        assert all(a.shape[1] % 2 == 0 for a in arrays)
        return nn(*arrays, implementation="xla", **options)

    nn = jax.nn.dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", plain)
        for T, K, window, packed in [(8, 8, 0, False), (8, 8, 3, False), (8, 8, 3, True), (8, 10, 0, False),
                                     (7, 7, 0, False), (1, 1, 0, False), (7, 7, 3, True), (7, 9, 0, True)]:  # fmt: skip
            arrays, ids = inputs(T, K), documents(T) if packed else None
            got = both(lambda *a, ids=ids, w=window: cudnn.attention(*a, ids, w, 0.0, 0.3), arrays)
            want = both(lambda *a, ids=ids, w=window: reference.attention(*a, ids, w, 0.0, 0.3), arrays)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert asked["implementation"] == "cudnn"
