"""The Mosaic TPU form, interpreted, against the recurrence as it is written; and that it lowers for a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.gla import gla, reference
from tests.pallas_kernels import kernel_checks as checks
from tests.pallas_kernels.gla.kernel_checks import inputs

F32 = {"dtype": jnp.float32}


@pytest.mark.parametrize(
    ("shape", "gates", "documents", "rough"),
    [
        ({"T": 130, "B": 2, "dk": 40, **F32}, "mild", True, 2e-6),  # a chunk and 2 tokens, a width that is padded
        ({"T": 130, "H": 2, "dk": 24, "dv": 40, **F32}, "mixed", False, 1e-4),  # sums of many decades
        ({"T": 1, "dv": 192, **F32}, "open", False, 2e-6),
        ({"T": 9, "dk": 16, "dv": 16, **F32}, "closed", True, 2e-6),
        ({"T": 131, "dk": 16, "dv": 16, **F32}, "none", False, 2e-6),
        ({"T": 140, "dk": 128}, "mild", True, 5e-3),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents, rough):
    arrays, cotangents, reset = inputs(**shape, gates=gates)
    reset = reset if documents else None
    run, definition = (partial(f, reset=reset) for f in (gla, reference.gla))
    # decays' gradients are sums of what mostly cancels where gates are closed
    floor = 1.0 if gates == "closed" else 1e-4
    assert max(checks.errors(run, definition, "mosaic_tpu", arrays, cotangents, floor)) <= rough


def test_channels_that_close_beside_channels_that_stay_open():
    (q, k, v, g, state), cotangents, _ = inputs(140, dk=16, dv=16, dtype=jnp.float32)
    g = jnp.zeros_like(g).at[..., ::2].set(-100.0)
    assert max(checks.errors(gla, reference.gla, "mosaic_tpu", (q, k, v, g, state), cotangents)) <= 2e-6


def test_a_population_equals_its_members():
    """Some inputs may be the same for all members."""
    members = [inputs(8, dk=16, dv=16, seed=s)[:2] for s in (1, 2)]
    checks.a_population_equals_its_members(gla, "mosaic_tpu", members, (0, 4), 1e-5)


@pytest.mark.parametrize(
    ("H", "dk", "dv", "documents", "dtype"),
    [
        (16, 64, 64, True, jnp.bfloat16), (16, 128, 128, False, jnp.float32), (4, 192, 384, True, jnp.bfloat16),
        (3, 256, 512, False, jnp.bfloat16), (2, 40, 72, True, jnp.float32),
    ],
)  # fmt: skip
def test_lowers_for_a_tpu_at_training_shapes(H, dk, dv, documents, dtype):
    B, T = 4, 4096
    args = [jax.ShapeDtypeStruct((B, T, H, d), dtype) for d in (dk, dk, dv)]
    args += [jax.ShapeDtypeStruct((B, T, H, dk), jnp.float32)]
    args += [jax.ShapeDtypeStruct((B, T), bool)] if documents else []
    run = partial(gla, kernels="mosaic_tpu")
    forward, both = checks.tpu_calls(lambda *a: run(*a[:4], None, *a[4:]), args, "chunk_walk")
    assert forward == 1
    assert both >= 2


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, g, state), _, _ = inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        gla(q, k, v.astype(jnp.float16), g, state, kernels="mosaic_tpu")
    wide = [jax.ShapeDtypeStruct((1, 8, 1, d), jnp.float32) for d in (512, 512, 1024, 512)]
    with pytest.raises(dispatch.Unsupported, match="a state of 512 x 1024 takes 30 MiB of VMEM, over 16"):
        jax.eval_shape(partial(gla, kernels="mosaic_tpu"), *wide)


def test_on_a_tpu_it_waits_for_its_first_measurement(monkeypatch):
    arrays, _, _ = inputs(8)
    checks.waits_for_its_first_measurement("gla", gla, arrays, monkeypatch)
