"""Both passes in Mosaic GPU, interpreted, against the definition in float32; what it compiles to for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.short_conv import short_conv
from tests.pallas_kernels import kernel_checks as common
from tests.pallas_kernels.short_conv import kernel_checks as checks

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "documents"),
    [
        ((2, 1, 128, 4), jnp.float32, False),  # less than a tile
        ((1, 5, 384, 4), jnp.bfloat16, True),  # three blocks of 128 channels
        ((1, 130, 256, 4), jnp.float32, True),  # a span and two tokens
        ((1, 136, 128, 3), jnp.bfloat16, True),  # whole tiles, not whole spans
        ((1, 300, 128, 2), jnp.bfloat16, False),  # two spans and a part
        ((1, 9, 40, 8), jnp.float32, True),  # channels are padded; as many taps as it takes
    ],
)
def test_equals_the_definition_in_values_and_all_gradients(shape, dtype, documents):
    out, dx, d_past, d_taps, d_bias = checks.errors("mosaic_gpu", shape, dtype, documents)
    rounded = dtype == jnp.bfloat16
    assert out <= (4e-3 if rounded else 1e-6)
    assert max(dx, d_past) <= (2.5e-3 if rounded else 1e-6)  # in x's dtype
    assert max(d_taps, d_bias) <= 2e-6  # which the sums never are


@pytest.mark.parametrize("shared", [(), (2, 3)])
def test_a_population_equals_its_members(shared):
    members = [checks.inputs(2, 3, 128, 2, seed=seed)[:2] for seed in (1, 2)]
    common.a_population_equals_its_members(checks.of(None), "mosaic_gpu", members, shared, 1e-6)


@pytest.mark.parametrize("documents", [False, True])
def test_lowers_for_cuda_at_training_shapes_with_remat(documents):
    B, T, E, K = 8, 2048, 1792, 4
    shapes = [((B, T, E), jnp.bfloat16), ((B, K - 1, E), jnp.bfloat16), ((K, E), jnp.float32), ((E,), jnp.float32)]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    args += [jax.ShapeDtypeStruct((B, K - 1, T), bool)] if documents else []

    def run(*a):
        return short_conv(*a, kernels="mosaic_gpu"), jnp.zeros(())

    assert common.cuda_calls(run, args) == (1, 1)  # the value is not asked for beside the gradient


def test_refuses_by_name_what_it_does_not_take():
    (x, past, taps, bias), _, _ = checks.inputs(1, 4, 8, 9)
    with pytest.raises(dispatch.Unsupported, match="takes 2 to 8 taps, not 9"):
        short_conv(x, past, taps, bias, kernels="mosaic_gpu")
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        short_conv(x.astype(jnp.float16), past, taps, bias, kernels="mosaic_gpu")
