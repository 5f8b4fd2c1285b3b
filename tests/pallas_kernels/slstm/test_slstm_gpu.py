"""The Mosaic GPU kernels, interpreted, against plain JAX; what they compile to is checked for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.slstm import slstm
from tests.pallas_kernels.slstm import kernel_checks as checks

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.mark.parametrize(
    ("shape", "documents", "scale"),
    [
        ((9, 5, 1, 64), True, 1.0),  # a tile of rows and one more; more tokens than are in flight
        ((1, 1, 2, 64), False, 1.0),  # one token
        ((2, 3, 1, 128), False, 60.0),  # two warpgroups; extreme gates
        ((1, 2, 1, 192), True, 1.0),  # three, of the widest head
    ],
)
def test_equals_the_plain_form_in_values_and_all_gradients(shape, documents, scale):
    checks.equals_the_plain_form("mosaic_gpu", shape, documents, scale)


@pytest.mark.parametrize("shared", [("R", "reset"), ("gates", "state")])
def test_a_population_equals_its_members(shared):
    checks.a_population_equals_its_members("mosaic_gpu", shared)


@pytest.mark.parametrize(("d", "documents"), [(64, True), (128, False), (192, True)])
def test_lowers_for_cuda_at_training_shapes_with_remat(d, documents):
    text = checks.lowered_gradients("mosaic_gpu", "cuda", d, documents)
    assert "slstm_forward" in text
    assert "slstm_backward" in text


def test_refuses_by_name_what_it_does_not_take():
    (gates, R, state), _, _ = checks.inputs(1, 2, 1, 32)
    with pytest.raises(dispatch.Unsupported, match="takes heads of width 64, 128, 192, not 32"):
        slstm(gates, R, state, kernels="mosaic_gpu")


def test_is_the_choice_on_a_hopper(monkeypatch):
    gates = jax.ShapeDtypeStruct((2, 4, 1, 4, 64), jnp.float32)
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA H100", "9.0"))
    with dispatch.listening() as heard:
        jax.eval_shape(slstm, gates, jax.ShapeDtypeStruct((4, 1, 64, 64), jnp.float32))
    assert [(op, choice.implementation) for op, choice in heard] == [("slstm", "mosaic_gpu")]
