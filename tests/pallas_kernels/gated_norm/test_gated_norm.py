"""The gated norm against its definition: values and all gradients, in every dtype and by groups."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.gated_norm import gated_norm
from tests.pallas_kernels.gated_norm import kernel_checks as checks


@pytest.mark.parametrize(("T", "groups"), [(1, 1), (5, 1), (40, 3)])
def test_the_plain_form_equals_the_definition(T, groups):
    assert max(checks.errors("xla", (2, T, 12, 6), jnp.float32, groups)) <= 1e-6
    assert max(checks.errors("xla", (2, T, 12, 6), jnp.bfloat16, groups)) <= 1.5e-2  # skip and gate in it


@pytest.mark.parametrize("kernels", ["xla", "reference"])
def test_by_hand(kernels):
    """Two heads, each a group of its own; a gate of nearly 1."""
    y, u = jnp.asarray([[[3.0, 0.0, 1.0, 1.0]]]), jnp.asarray([[[0.0, 2.0, 1.0, 0.0]]])
    z = jnp.full((1, 1, 4), 30.0)
    skip, gain = jnp.asarray([2.0, -1.0]), jnp.asarray([1.0, 1.0, 5.0, 5.0])
    out = gated_norm(y, u, z, skip, gain, groups=2, eps=0.0, kernels=kernels)
    np.testing.assert_allclose(out[0, 0], [3 / 12.5**0.5, 4 / 12.5**0.5, 0, 5 * 2**0.5], rtol=1e-6)


def test_groups_divide_the_heads():
    arrays, _ = checks.inputs(1, 2, 12, 4)
    with pytest.raises(ValueError, match="3 groups for 4 heads"):
        checks.several(*arrays, groups=3)


def test_one_token_is_plain_without_a_warning(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("gpu", "NVIDIA H100", "9.0"))
    with dispatch.listening() as heard:
        checks.several(*checks.inputs(2, 1, 128, 2)[0])
    assert [(op, choice.implementation) for op, choice in heard] == [("gated_norm", "xla")]
