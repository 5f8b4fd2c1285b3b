"""The Mosaic GPU form, interpreted, against the delta rule as it is written; and that it lowers for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.delta_rule import delta_rule, reference
from tests.pallas_kernels import kernel_checks as checks
from tests.pallas_kernels.delta_rule.kernel_checks import inputs, of

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.mark.parametrize(
    ("shape", "gates", "highest", "documents"),
    [
        ({"T": 134, "B": 2}, "mild", 2.0, True),  # two chunks and 6 tokens
        ({"T": 130, "H": 2, "dk": 128}, "mixed", 1.0, False),  # heads that share a key
        ({"T": 1, "dv": 128}, "open", 1.0, False),  # one token; values in two blocks
        ({"T": 66}, None, 2.0, True),  # no decay
        ({"T": 9, "dk": 24, "dv": 40}, "closed", 1.0, False),  # widths are padded
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, highest, documents):
    arrays, cotangents, reset = inputs(**shape, gates=gates, highest=highest)
    reset = reset if documents else None
    run, definition = of(delta_rule, reset), of(reference.delta_rule, reset)
    found = checks.errors(run, definition, "mosaic_gpu", arrays, cotangents)
    assert max(found[:2]) <= 4e-3
    assert max(found[2:]) <= 6e-3


def test_a_population_equals_its_members():
    """Some inputs may be the same for all members."""
    members = [inputs(8, seed=s)[:2] for s in (1, 2)]
    checks.a_population_equals_its_members(of(delta_rule), "mosaic_gpu", members, (1, 5), 1e-5)


@pytest.mark.parametrize(("G", "H", "dk", "dv", "documents"), [(16, 16, 128, 128, True), (4, 8, 192, 256, False)])
def test_lowers_for_cuda_at_training_shapes(G, H, dk, dv, documents):
    B, T = 4, 4096
    shapes = [(B, T, G, dk), (B, T, G, dk), (B, T, H, dv)]
    args = [*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)]
    args += [jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2
    args += [jax.ShapeDtypeStruct((B, T), bool)] if documents else []
    forward, both = checks.cuda_calls(lambda *a: delta_rule(*a[:5], None, *a[5:], kernels="mosaic_gpu"), args)
    assert forward == 2  # chunks and the walk
    assert both >= 4


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, beta, g, state), _, _ = inputs(8)
    run = partial(of(delta_rule), kernels="mosaic_gpu")
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 values, not float32"):
        run(q, k, v.astype(jnp.float32), beta, g, state)
    with pytest.raises(dispatch.Unsupported, match="takes keys of a width up to 192, not 256"):
        run(jnp.tile(q, 4), jnp.tile(k, 4), v, beta, g, jnp.tile(state, (1, 1, 4, 1)))
