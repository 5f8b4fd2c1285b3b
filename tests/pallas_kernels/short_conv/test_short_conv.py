"""The short convolution against its definition: values, all gradients, and documents as if each were alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.short_conv import reference, short_conv
from tests.pallas_kernels.short_conv import kernel_checks as checks


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("T", "K"), [(1, 4), (3, 2), (5, 4), (40, 4), (7, 1)])
def test_the_plain_form_equals_the_definition(T, K, documents):
    assert max(checks.errors("xla", (2, T, 6, K), jnp.float32, documents)) <= 1e-6
    assert max(checks.errors("xla", (2, T, 6, K), jnp.bfloat16, documents)) <= 1.2e-2  # silu, and its gradient, in it


def test_by_hand():
    x, past = jnp.asarray([[[1.0], [2.0], [3.0]]]), jnp.asarray([[[5.0]]])
    taps, bias = jnp.asarray([[10.0], [1.0]]), jnp.asarray([0.5])
    seen = jnp.asarray([[[True, False, True]]])  # the second token begins a document
    sums = np.asarray([51.5, 2.5, 23.5])
    np.testing.assert_allclose(
        reference.short_conv(x, past, taps, bias, seen)[0, :, 0], sums / (1 + np.exp(-sums)), rtol=1e-6
    )


@pytest.mark.parametrize("kernels", ["xla", "reference"])
def test_a_split_with_the_last_inputs_handed_over(kernels):
    (x, past, taps, bias), _, _ = checks.inputs(2, 9, 6, 4)
    whole = short_conv(x, past, taps, bias, kernels=kernels)
    halves = (
        short_conv(x[:, :5], past, taps, bias, kernels=kernels),
        short_conv(x[:, 5:], x[:, 2:5], taps, bias, kernels=kernels),
    )
    np.testing.assert_allclose(jnp.concatenate(halves, axis=1), whole, rtol=1e-6, atol=1e-6)
