"""The kernels for TPUs, interpreted, against plain JAX; and that they lower for a TPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.slstm import slstm, tpu
from tests.pallas_kernels.slstm import kernel_checks as checks


@pytest.mark.parametrize(
    ("shape", "documents", "scale"),
    [
        ((33, 3, 1, 64), True, 1.0),  # two blocks of rows, each with some left; a span and a token
        ((1, 1, 2, 40), False, 1.0),  # one token
        ((2, 7, 1, 128), False, 60.0),  # extreme gates; spans with some left
    ],
)
def test_equals_the_plain_form_in_values_and_all_gradients(shape, documents, scale):
    checks.equals_the_plain_form("mosaic_tpu", shape, documents, scale, rough=3e-6)


@pytest.mark.parametrize("shared", [("R", "reset"), ("gates", "state")])
def test_a_population_equals_its_members(shared):
    checks.a_population_equals_its_members("mosaic_tpu", shared)


@pytest.mark.parametrize(("d", "documents"), [(64, True), (128, False), (512, True)])
def test_lowers_for_a_tpu_at_training_shapes_with_remat(d, documents):
    text = checks.lowered_gradients("mosaic_tpu", "tpu", d, documents)
    assert 'kernel_name = "slstm_forward"' in text
    assert 'kernel_name = "slstm_backward"' in text


def test_blocks_and_spans():
    assert [tpu.rows(batch) for batch in (1, 9, 32, 33, 80)] == [8, 16, 32, 24, 32]
    assert [tpu.span(*sides) for sides in ((8, 128, 2048), (8, 128, 5), (32, 512, 2048))] == [32, 4, 1]


def test_refuses_by_name_what_it_does_not_take():
    gates, R = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 4, 1, 4, 768), (4, 1, 768, 768)))
    with pytest.raises(dispatch.Unsupported, match="heads of width 768 take 19 MiB of VMEM, over 16"):
        jax.eval_shape(lambda *a: slstm(*a, kernels="mosaic_tpu"), gates, R)
