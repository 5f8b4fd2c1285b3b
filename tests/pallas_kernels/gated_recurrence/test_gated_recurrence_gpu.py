"""The Mosaic GPU kernel, interpreted, against the recurrence as it is written; and that it lowers for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_recurrence import gated_recurrence, reference
from tests.pallas_kernels.checks import GATES, cotangents_of, custom_calls, errors, population_equals_members

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


def inputs(T, B=1, G=1, H=1, dk=64, dv=64, gates="mild", seed=0):
    """(q, k, v, log_decay, state), the cotangents, documents."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(rng.normal(size=shape), dtype)

    g = jnp.float32(rng.uniform(*GATES[gates], size=(B, T, H)))
    state = normal(B, H, dk, dv, dtype=jnp.float32)
    arrays = normal(B, T, G, dk) * dk**-0.5, normal(B, T, G, dk) * dk**-0.5, normal(B, T, H, dv), g, state
    return arrays, cotangents_of(arrays[2], state, rng), jnp.asarray(rng.random((B, T)) < 0.05).at[:, T // 2].set(True)


def kernel(*args):
    return gated_recurrence(*args, kernels="mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 70, "B": 2}, "mild", True),  # a chunk and 6 tokens
        ({"T": 66, "H": 2, "dk": 128}, "mixed", False),  # heads that share a key
        ({"T": 1, "dv": 192}, "open", False),  # one token; values in pieces
        ({"T": 16}, "closed", True),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents):
    arrays, cotangents, reset = inputs(**shape, gates=gates)
    reset = reset if documents else None
    found = errors(
        lambda *a: kernel(*a, reset), lambda *a: reference.gated_recurrence(*a, reset), arrays, cotangents
    )  # fmt: skip
    assert max(found) <= 5e-3


def test_without_a_state_and_its_cotangent():
    """What a training step asks for: no initial state, the last one unused."""
    (*arrays, _), (d_out, _), _ = inputs(9)

    def loss(f):
        return jax.grad(lambda *a: jnp.sum(f(*a)[0].astype(jnp.float32) * d_out), argnums=range(4))(*arrays)

    with dispatch.interpreted():
        got = loss(kernel)
    for a, b in zip(got, loss(reference.gated_recurrence), strict=True):
        assert float(jnp.linalg.norm((a - b).astype(jnp.float32))) <= 6e-3 * float(jnp.linalg.norm(b))


@pytest.mark.parametrize("shared", [(0, 3), (2, 4)])
def test_a_population_equals_its_members(shared):
    """Some inputs may be the same for all members."""
    population_equals_members(kernel, [inputs(8, seed=s)[:2] for s in (1, 2)], shared)


@pytest.mark.parametrize(("G", "H", "dk", "dv", "documents"), [(1, 64, 128, 64, True), (8, 8, 256, 512, False)])
def test_lowers_for_cuda_at_training_shapes(G, H, dk, dv, documents):
    B, T = 4, 4096
    shapes = [(B, T, G, dk), (B, T, G, dk), (B, T, H, dv)]
    args = [*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), jax.ShapeDtypeStruct((B, T, H), jnp.float32)]
    args += [jax.ShapeDtypeStruct((B, T), bool)] if documents else []

    forward, both = custom_calls(lambda *a: kernel(*a[:4], None, *a[4:]), args)
    assert forward == 1
    assert both >= 3


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, g, state), _, _ = inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 values, not float32"):
        kernel(q, k, v.astype(jnp.float32), g, state)
    with pytest.raises(dispatch.Unsupported, match="takes keys of a width of 64, 128, 192 or 256, not 32"):
        kernel(q[..., :32], k[..., :32], v, g, state[:, :, :32])
    with pytest.raises(dispatch.Unsupported, match="takes values of a width that is a multiple of 64, not 40"):
        kernel(q, k, v[..., :40], g, state[..., :40])
