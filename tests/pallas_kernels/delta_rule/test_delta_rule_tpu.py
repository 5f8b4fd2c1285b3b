"""The Mosaic TPU form, interpreted, against the delta rule as it is written; and that it lowers for a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.delta_rule import delta_rule, reference
from tests.pallas_kernels import kernel_checks as checks
from tests.pallas_kernels.delta_rule.kernel_checks import inputs, of

F32 = {"dtype": jnp.float32}


@pytest.mark.parametrize(
    ("shape", "gates", "highest", "documents", "rough"),
    [
        ({"T": 130, "B": 2, "dk": 40, **F32}, "mild", 2.0, True, 2e-6),  # a chunk and 2 tokens, a width that is padded
        ({"T": 130, "G": 2, "H": 4, "dk": 16, "dv": 24, **F32}, "mixed", 1.0, False, 1e-4),  # heads that share a key
        ({"T": 1, "dv": 192, **F32}, "open", 1.0, False, 2e-6),
        ({"T": 131, "dk": 16, "dv": 16, **F32}, None, 2.0, True, 2e-6),  # no decay
        ({"T": 9, "dk": 16, "dv": 16, **F32}, "closed", 2.0, False, 2e-6),
        ({"T": 140, "dk": 128}, "mild", 1.0, True, 5e-3),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, highest, documents, rough):
    arrays, cotangents, reset = inputs(**shape, gates=gates, highest=highest)
    reset = reset if documents else None
    run, definition = of(delta_rule, reset), of(reference.delta_rule, reset)
    # decays' gradients are sums of what mostly cancels where gates are closed
    floor = 1.0 if gates == "closed" else 1e-4
    assert max(checks.errors(run, definition, "mosaic_tpu", arrays, cotangents, floor)) <= rough


@pytest.mark.parametrize(("dtype", "rough"), [(jnp.float32, 5e-5), (jnp.bfloat16, 4e-2)])
def test_one_key_again_and_again_with_beta_2(dtype, rough):
    """The worst case for the triangular system, all of whose entries are 2."""
    (q, k, v, beta, state), cotangents, _ = inputs(140, dk=16, dv=16, gates=None, dtype=dtype)
    arrays = q, jnp.broadcast_to(k[:, :1], k.shape), v, jnp.full_like(beta, 2.0), state
    found = checks.errors(of(delta_rule), of(reference.delta_rule), "mosaic_tpu", arrays, cotangents)
    assert max(found) <= rough


def test_a_population_equals_its_members():
    """Some inputs may be the same for all members."""
    members = [inputs(8, dk=16, dv=16, seed=s)[:2] for s in (1, 2)]
    checks.a_population_equals_its_members(of(delta_rule), "mosaic_tpu", members, (1, 5), 1e-5)


@pytest.mark.parametrize(
    ("G", "H", "dk", "dv", "documents", "dtype"),
    [
        (16, 16, 64, 64, True, jnp.bfloat16), (16, 16, 128, 128, False, jnp.float32),
        (4, 8, 192, 384, True, jnp.bfloat16), (3, 3, 256, 512, False, jnp.bfloat16), (1, 2, 40, 72, True, jnp.float32),
    ],
)  # fmt: skip
def test_lowers_for_a_tpu_at_training_shapes(G, H, dk, dv, documents, dtype):
    B, T = 4, 4096
    args = [jax.ShapeDtypeStruct(s, dtype) for s in ((B, T, G, dk), (B, T, G, dk), (B, T, H, dv))]
    args += [jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2
    args += [jax.ShapeDtypeStruct((B, T), bool)] if documents else []
    run = partial(delta_rule, kernels="mosaic_tpu")
    forward, both = checks.tpu_calls(lambda *a: run(*a[:5], None, *a[5:]), args, "chunk_walk")
    assert forward == 1
    assert both >= 2


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, beta, g, state), _, _ = inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        delta_rule(q, k, v.astype(jnp.float16), beta, g, state, kernels="mosaic_tpu")
    wide = [jax.ShapeDtypeStruct((1, 8, 1, d), jnp.float32) for d in (640, 640, 512)]
    with pytest.raises(dispatch.Unsupported, match="a state of 640 x 512 takes 20 MiB of VMEM, over 16"):
        jax.eval_shape(lambda *a: delta_rule(*a, beta, kernels="mosaic_tpu"), *wide)


def test_on_a_tpu_it_waits_for_its_first_measurement(monkeypatch):
    arrays, _, _ = inputs(8)
    checks.waits_for_its_first_measurement("delta_rule", delta_rule, arrays, monkeypatch)
