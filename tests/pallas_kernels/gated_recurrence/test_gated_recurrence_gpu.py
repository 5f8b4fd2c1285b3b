"""The Mosaic GPU kernel, interpreted, against the recurrence as it is written; and that it lowers for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_recurrence import gated_recurrence, reference
from tests.pallas_kernels.gated_recurrence import kernel_checks as checks

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


def kernel(*args):
    return gated_recurrence(*args, kernels="mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 70, "B": 2}, "mild", True),  # a chunk and 6 tokens
        ({"T": 66, "H": 2, "dk": 128}, "mixed", False),  # heads that share a key
        ({"T": 130, "H": 6, "G": 2, "B": 2}, "mild", True),  # three each, so that a head takes another's place
        ({"T": 66, "H": 2, "dv": 128}, "mild", False),  # of values too wide to sum the heads in the kernel
        ({"T": 1, "dv": 192}, "open", False),  # one token; values in pieces
        ({"T": 16}, "closed", True),
        ({"T": 9, "dk": 24, "dv": 40}, "mild", True),  # widths are padded
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents):
    checks.equals_the_reference("mosaic_gpu", shape, gates, documents)


def test_with_weights():
    checks.equals_the_reference("mosaic_gpu", {"T": 70, "H": 2}, "mild", True, weighted=True)


def test_without_a_state_and_its_cotangent():
    """What a training step asks for: no initial state, the last one unused."""
    (*arrays, _), (d_out, _), _ = checks.inputs(9)

    def loss(f):
        return jax.grad(lambda *a: jnp.sum(f(*a)[0].astype(jnp.float32) * d_out), argnums=range(4))(*arrays)

    with dispatch.interpreted():
        got = loss(kernel)
    for a, b in zip(got, loss(reference.gated_recurrence), strict=True):
        assert float(jnp.linalg.norm((a - b).astype(jnp.float32))) <= 6e-3 * float(jnp.linalg.norm(b))


@pytest.mark.parametrize("shared", [(0, 3), (2, 4)])
def test_a_population_equals_its_members(shared):
    checks.a_population_equals_its_members("mosaic_gpu", shared)


@pytest.mark.parametrize(("G", "H", "dk", "dv", "documents"), [(1, 64, 128, 64, True), (8, 8, 256, 512, False)])
def test_lowers_for_cuda_at_training_shapes(G, H, dk, dv, documents):
    forward, backward = checks.lowered("mosaic_gpu", "cuda", G, H, dk, dv, documents)
    assert forward.count("custom_call @mosaic_gpu") == 1
    assert backward.count("custom_call @mosaic_gpu") >= 3


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, g, state), _, _ = checks.inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 values, not float32"):
        kernel(q, k, v.astype(jnp.float32), g, state)
    with pytest.raises(dispatch.Unsupported, match="takes keys of a width up to 256, not 320"):
        kernel(*(jnp.tile(a, 5) for a in (q, k)), v, g, jnp.tile(state, (1, 1, 5, 1)))
