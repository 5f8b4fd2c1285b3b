"""The Mosaic GPU kernels, interpreted, against plain JAX; what they compile to is checked for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.slstm import State, slstm

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


def inputs(B, T, H, d, scale=1.0, seed=0):
    """R as the kernel rounds it, so that only the order of sums differs."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    def states():
        return State(normal(B, H, d), normal(B, H, d), jnp.abs(normal(B, H, d)) + 1, normal(B, H, d))

    R = (d**-0.5 * normal(4, H, d, d)).astype(jnp.bfloat16).astype(jnp.float32)
    reset = jnp.asarray(rng.random((B, T)) < 0.3)
    return (scale * normal(B, T, H, 4, d), R, states()), (normal(B, T, H, d), states()), reset


def values_and_gradients(f, arrays, cotangents):
    out, pull = jax.vjp(f, *arrays)
    return jax.tree.leaves((out, pull(cotangents)))


def kernel(*args):
    return slstm(*args, kernels="mosaic_gpu")


def plain(*args):
    return slstm(*args, kernels="xla")


@pytest.mark.parametrize(
    ("shape", "documents", "scale"),
    [
        ((9, 5, 1, 64), True, 1.0),  # a tile of rows and one more; more tokens than are in flight
        ((1, 1, 2, 64), False, 1.0),  # one token
        ((2, 3, 1, 128), False, 60.0),  # two warpgroups; extreme gates
    ],
)
def test_equals_the_plain_form_in_values_and_all_gradients(shape, documents, scale):
    arrays, cotangents, reset = inputs(*shape, scale)
    reset = reset if documents else None
    with dispatch.interpreted():
        got = values_and_gradients(lambda *a: kernel(*a, reset), arrays, cotangents)
    want = values_and_gradients(lambda *a: plain(*a, reset), arrays, cotangents)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) <= 2e-5 * float(jnp.linalg.norm(b)) + 1e-30


def test_three_warpgroups_of_the_widest_head():
    (gates, R, state), _, _ = inputs(1, 2, 1, 192)
    with dispatch.interpreted():
        got = kernel(gates, R, state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain(gates, R, state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [("R", "reset"), ("gates", "state")])
def test_a_population_equals_its_members(shared):
    """Some inputs may be the same for all members."""
    names = ("gates", "R", "state", "reset")
    members = [inputs(1, 2, 1, 64, seed=s) for s in (1, 2)]
    args = [(*arrays, reset) for arrays, _, reset in members]
    dh = members[0][1]
    axes = [None if name in shared else 0 for name in names]
    stacked = [
        args[0][i] if name in shared else jax.tree.map(lambda *a: jnp.stack(a), *(m[i] for m in args))
        for i, name in enumerate(names)
    ]

    def run(form, gates, R, state, reset):
        return values_and_gradients(lambda *a: form(*a, reset), (gates, R, state), dh)

    with dispatch.interpreted():
        together = jax.vmap(lambda *a: run(kernel, *a), in_axes=axes)(*stacked)
    for k in range(2):
        alone = run(plain, *(args[0 if name in shared else k][i] for i, name in enumerate(names)))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d", "documents"), [(64, True), (128, False), (192, True)])
def test_lowers_for_cuda_at_training_shapes_with_remat(d, documents):
    B, T, H = 16, 2048, 4
    shapes = [(B, T, H, 4, d), (4, H, d, d)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    reset = [jax.ShapeDtypeStruct((B, T), bool)] if documents else []

    @jax.checkpoint
    def block(gates, R, *reset):
        return jnp.sum(kernel(gates, R, None, *reset)[0])

    text = jax.jit(jax.grad(block, argnums=(0, 1))).trace(*args, *reset).lower(lowering_platforms=("cuda",)).as_text()
    assert "slstm_forward" in text
    assert "slstm_backward" in text


def test_refuses_by_name_what_it_does_not_take():
    (gates, R, state), _, _ = inputs(1, 2, 1, 32)
    with pytest.raises(dispatch.Unsupported, match="takes heads of width 64, 128, 192, not 32"):
        kernel(gates, R, state)


def test_is_the_choice_on_a_hopper(monkeypatch):
    gates = jax.ShapeDtypeStruct((2, 4, 1, 4, 64), jnp.float32)
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA H100", "9.0"))
    with dispatch.listening() as heard:
        jax.eval_shape(slstm, gates, jax.ShapeDtypeStruct((4, 1, 64, 64), jnp.float32))
    assert [(op, choice.implementation) for op, choice in heard] == [("slstm", "mosaic_gpu")]
