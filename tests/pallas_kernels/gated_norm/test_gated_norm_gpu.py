"""Both passes in Mosaic GPU, interpreted, against the definition in float32; what they compile to for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.gated_norm import gated_norm
from tests.pallas_kernels import kernel_checks as common
from tests.pallas_kernels.gated_norm import kernel_checks as checks

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.fixture
def few_blocks(monkeypatch):
    """So that a block has more tokens than slots."""
    monkeypatch.setattr(dispatch.form("gated_norm", "mosaic_gpu"), "SMS", 1)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((1, 2, 128, 2), 1, jnp.float32),
        ((3, 5, 384, 6), 3, jnp.bfloat16),  # blocks of fewer tokens than slots
        ((1, 130, 384, 3), 1, jnp.float32),
        ((2, 9, 1792, 28), 1, jnp.bfloat16),
        ((1, 7, 1024, 2), 1, jnp.bfloat16),  # eight channels at a time
    ],
)
def test_equals_the_definition_in_values_and_all_gradients(shape, groups, dtype, few_blocks):
    out, dy, du, dz, d_skip, d_gain = checks.errors("mosaic_gpu", shape, dtype, groups)
    rounded = dtype == jnp.bfloat16
    assert max(out, dy, dz) <= (2.5e-3 if rounded else 1e-6)
    assert du <= (3.5e-3 if rounded else 1e-6)  # rounded twice
    assert max(d_skip, d_gain) <= 2e-6  # never rounded


@pytest.mark.parametrize("shared", [(), (3, 4)])
def test_a_population_equals_its_members(shared, few_blocks):
    members = [checks.inputs(2, 3, 128, 2, seed=seed) for seed in (1, 2)]
    common.a_population_equals_its_members(checks.several, "mosaic_gpu", members, shared, 1e-6)


def test_lowers_for_cuda_at_training_shapes_with_remat():
    B, T, E, H = 8, 2048, 1792, 28
    shapes = [((B, T, E), jnp.bfloat16)] * 3 + [((H,), jnp.bfloat16), ((E,), jnp.float32)]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def run(*a):
        return gated_norm(*a, eps=checks.EPS, kernels="mosaic_gpu"), jnp.zeros(())

    assert common.cuda_calls(run, args) == (1, 1)  # the forward kernel keeps nothing, so the gradient does not run it


def test_refuses_by_name_what_it_does_not_take():
    def refused(arrays, why, groups=1):
        with pytest.raises(dispatch.Unsupported, match=why):
            checks.several(*arrays, groups=groups, kernels="mosaic_gpu")

    y, u, *rest = checks.inputs(1, 2, 128, 2)[0]
    refused((y, u, *rest), "takes groups of a multiple of 128 channels up to 4096, not of 64", groups=2)
    refused((y, u.astype(jnp.bfloat16), *rest), "takes bfloat16 or float32, not float32 with bfloat16 and float32")
    refused(checks.inputs(1, 2, 4224, 2)[0], "not of 4224")
