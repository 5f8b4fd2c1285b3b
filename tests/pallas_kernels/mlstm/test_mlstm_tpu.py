"""The cell by the kernel for TPUs, interpreted, against the cell as it is written; and that it lowers for a TPU."""

import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.mlstm import mlstm
from tests.pallas_kernels.mlstm import kernel_checks as checks


@pytest.mark.parametrize(
    ("shape", "gates", "documents", "rough"),
    [
        ({"T": 130, "dk": 40, "dtype": jnp.float32}, "mild", True, 2e-5),  # a chunk and 2 tokens
        ({"T": 1, "dv": 192, "dtype": jnp.float32}, "mild", False, 2e-5),
        ({"T": 66, "dtype": jnp.float32}, "extreme", True, 1e-3),  # tokens whose normaliser is near 0 weigh most
        ({"T": 140, "dk": 128}, "start", True, 6e-3),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents, rough):
    checks.equals_the_reference("mosaic_tpu", shape, gates, documents, rough)


@pytest.mark.parametrize("given", [False, True])
def test_a_population_equals_its_members(given):
    checks.a_population_equals_its_members("mosaic_tpu", given)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_a_tpu_at_training_shapes(dtype):
    assert checks.lowered_gradients("mosaic_tpu", "tpu", dtype).count('kernel_name = "gated_recurrence"') >= 4


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, i, f), *_ = checks.inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        mlstm(q, k, v.astype(jnp.float16), i, f, kernels="mosaic_tpu")
