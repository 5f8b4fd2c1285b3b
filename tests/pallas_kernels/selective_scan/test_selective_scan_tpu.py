"""The kernels for TPUs, interpreted, against the reference; and that they lower for a TPU."""

import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.selective_scan import selective_scan, tpu
from tests.pallas_kernels.selective_scan import kernel_checks as checks


@pytest.fixture
def small_tiles(monkeypatch):
    """Interpretation is slow."""
    monkeypatch.setattr(tpu, "TILE", 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "rates", "documents"),
    [
        ((1, 11, 150, 5), jnp.float32, "mild", True),  # a tile and 3 tokens, a block and 22 channels
        ((1, 9, 3, 32), jnp.float32, "fast", False),
        ((2, 1, 8, 16), jnp.bfloat16, "mild", True),  # one token
        ((1, 4, 8, 8), jnp.float32, "still", True),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(small_tiles, shape, dtype, rates, documents):
    checks.equals_the_reference("mosaic_tpu", shape, dtype, rates, documents)


@pytest.mark.parametrize("shared", [(2,), (0, 3)])
def test_a_population_equals_its_members(small_tiles, shared):
    checks.a_population_equals_its_members("mosaic_tpu", shared)


@pytest.mark.parametrize(("dtype", "N", "documents"), [(jnp.bfloat16, 16, False), (jnp.float32, 32, True)])
def test_lowers_for_a_tpu_at_training_shapes_with_remat(dtype, N, documents):
    text = checks.lowered_gradients("mosaic_tpu", "tpu", dtype, N, documents)
    assert 'kernel_name = "selective_scan_forward"' in text
    assert 'kernel_name = "selective_scan_backward"' in text


def test_blocks_are_as_wide_as_their_states_let_them_be():
    assert [tpu.block(*sides) for sides in ((2048, 16), (2048, 32), (2048, 128), (384, 16))] == [512, 256, 128, 128]


def test_refuses_by_name_what_it_does_not_take():
    (u, *rest), _, _ = checks.inputs(1, 4, 8, 129)
    with pytest.raises(dispatch.Unsupported, match="at most 128 states"):
        selective_scan(u, *rest, kernels="mosaic_tpu")
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        selective_scan(u.astype(jnp.float16), *rest, kernels="mosaic_tpu")
