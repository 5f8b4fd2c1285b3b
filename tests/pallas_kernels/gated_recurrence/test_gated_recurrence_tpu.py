"""The kernel for TPUs, interpreted, against the recurrence as it is written; and that it lowers for a TPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.gated_recurrence import gated_recurrence
from tests.pallas_kernels.gated_recurrence import kernel_checks as checks


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 130, "B": 2, "dk": 40}, "mild", True),  # a chunk and 2 tokens, a width that is no multiple
        ({"T": 66, "G": 2, "H": 4, "dk": 8, "dv": 72}, "mixed", False),  # heads that share a key
        ({"T": 1, "dv": 192}, "open", False),
        ({"T": 140, "dk": 128, "dtype": jnp.bfloat16}, "closed", True),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents):
    rough = 5e-3 if "dtype" in shape else 1e-4 if gates == "mixed" else 1e-5  # sums of many decades
    # decays' gradients are sums of what mostly cancels where gates are closed
    checks.equals_the_reference("mosaic_tpu", {"dtype": jnp.float32} | shape, gates, documents, rough, floor=3e-6)


def test_with_weights():
    checks.equals_the_reference(
        "mosaic_tpu", {"T": 130, "H": 2, "dtype": jnp.float32}, "mild", True, 1e-5, weighted=True
    )


@pytest.mark.parametrize("shared", [(0, 3), (2, 4)])
def test_a_population_equals_its_members(shared):
    checks.a_population_equals_its_members("mosaic_tpu", shared)


@pytest.mark.parametrize(
    ("G", "H", "dk", "dv", "documents", "dtype"),
    [(1, 64, 128, 64, True, jnp.bfloat16), (8, 8, 256, 512, False, jnp.bfloat16), (2, 4, 40, 72, True, jnp.float32)],
)
def test_lowers_for_a_tpu_at_training_shapes(G, H, dk, dv, documents, dtype):
    forward, backward = checks.lowered("mosaic_tpu", "tpu", G, H, dk, dv, documents, dtype)
    assert forward.count('kernel_name = "gated_recurrence"') == 1
    assert backward.count('kernel_name = "gated_recurrence"') >= 4


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, g, state), _, _ = checks.inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        gated_recurrence(q, k, v.astype(jnp.float16), g, state, kernels="mosaic_tpu")
    wide = [jax.ShapeDtypeStruct((1, 8, 1, d), jnp.float32) for d in (1024, 1024, 512)]
    with pytest.raises(dispatch.Unsupported, match="a state of 1024 x 512 takes 26 MiB of VMEM, over 16"):
        jax.eval_shape(lambda *a: gated_recurrence(*a, g, kernels="mosaic_tpu"), *wide)


def test_on_a_tpu_it_waits_for_its_first_measurement(monkeypatch):
    (q, k, v, g, _), _, _ = checks.inputs(8)
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("tpu", "TPU v5e"))
    for unmeasured, chosen in ((dispatch.UNMEASURED, "xla"), (set(), "mosaic_tpu")):
        monkeypatch.setattr(dispatch, "UNMEASURED", unmeasured)
        with dispatch.listening() as heard:
            jax.eval_shape(lambda *a: gated_recurrence(*a), q, k, v, g)  # traced anew
        assert [(op, choice.implementation) for op, choice in heard] == [("gated_recurrence", chosen)]
