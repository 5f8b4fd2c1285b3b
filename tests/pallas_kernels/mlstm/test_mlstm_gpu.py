"""The cell by the Mosaic GPU kernel, interpreted, against the cell as it is written; and that it lowers for CUDA."""

import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.mlstm import mlstm
from tests.pallas_kernels.mlstm import kernel_checks as checks

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 70}, "mild", True),  # a chunk and 6 tokens
        ({"T": 1, "dv": 192}, "mild", False),  # one token; values in pieces
        ({"T": 20, "dk": 128}, "start", True),
        ({"T": 66}, "extreme", False),
        ({"T": 9, "dk": 24, "dv": 40}, "mild", True),  # widths are padded
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents):
    # tokens whose normaliser is near 0 weigh most
    checks.equals_the_reference("mosaic_gpu", shape, gates, documents, rough=3e-2 if gates == "extreme" else 6e-3)


@pytest.mark.parametrize("given", [False, True])
def test_a_population_equals_its_members(given):
    checks.a_population_equals_its_members("mosaic_gpu", given)


def test_lowers_for_cuda_at_training_shapes():
    assert checks.lowered_gradients("mosaic_gpu", "cuda").count("custom_call @mosaic_gpu") >= 4


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, i, f), *_ = checks.inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 values, not float32"):
        mlstm(q, k, v.astype(jnp.float32), i, f, kernels="mosaic_gpu")
    with pytest.raises(dispatch.Unsupported, match="takes keys of a width up to 256, not 320"):
        mlstm(*(jnp.tile(a, 5) for a in (q, k)), v, i, f, kernels="mosaic_gpu")
