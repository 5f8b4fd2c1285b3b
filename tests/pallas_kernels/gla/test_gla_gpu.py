"""The Mosaic GPU form, interpreted, against the recurrence as it is written; and that it lowers for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.gla import gla, reference
from tests.pallas_kernels import kernel_checks as checks
from tests.pallas_kernels.gla.kernel_checks import inputs

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 134, "B": 2}, "mild", True),  # two chunks and 6 tokens
        ({"T": 130, "H": 2, "dk": 128}, "mixed", False),
        ({"T": 1, "dv": 128}, "open", False),  # one token; values in two blocks
        ({"T": 9, "dk": 24, "dv": 40}, "closed", True),  # widths are padded
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents):
    arrays, cotangents, reset = inputs(**shape, gates=gates)
    reset = reset if documents else None
    run, definition = (partial(f, reset=reset) for f in (gla, reference.gla))
    found = checks.errors(run, definition, "mosaic_gpu", arrays, cotangents)
    assert max(found[:2]) <= 4e-3
    assert max(found[2:]) <= 6e-3


def test_channels_that_close_beside_channels_that_stay_open():
    (q, k, v, g, state), cotangents, _ = inputs(70)
    g = jnp.zeros_like(g).at[..., ::2].set(-100.0)
    found = checks.errors(gla, reference.gla, "mosaic_gpu", (q, k, v, g, state), cotangents)
    assert max(found) <= 6e-3


def test_a_population_equals_its_members():
    """Some inputs may be the same for all members."""
    members = [inputs(8, seed=s)[:2] for s in (1, 2)]
    checks.a_population_equals_its_members(gla, "mosaic_gpu", members, (0, 4), 1e-5)


@pytest.mark.parametrize(("H", "dk", "dv", "documents"), [(16, 128, 128, True), (4, 256, 512, False)])
def test_lowers_for_cuda_at_training_shapes(H, dk, dv, documents):
    B, T = 4, 4096
    args = [jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16) for d in (dk, dk, dv)]
    args += [jax.ShapeDtypeStruct((B, T, H, dk), jnp.float32)]
    args += [jax.ShapeDtypeStruct((B, T), bool)] if documents else []
    forward, both = checks.cuda_calls(lambda *a: gla(*a[:4], None, *a[4:], kernels="mosaic_gpu"), args)
    assert forward == 2  # chunks and the walk
    assert both >= 4


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, g, state), _, _ = inputs(8)
    run = partial(gla, kernels="mosaic_gpu")
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 values, not float32"):
        run(q, k, v.astype(jnp.float32), g, state)
    with pytest.raises(dispatch.Unsupported, match="takes keys of a width up to 256, not 320"):
        run(jnp.tile(q, 5), jnp.tile(k, 5), v, jnp.tile(g, 5), jnp.tile(state, (1, 1, 5, 1)))
