"""What every form of the short convolution is held against."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from pallas_kernels.short_conv import short_conv
from tests.pallas_kernels import kernel_checks as common


def inputs(B, T, E, K, *, dtype=jnp.float32, seed=0):
    """x, past, taps, bias; the cotangent; and what is seen of documents that one token in three begins."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arrays = normal(B, T, E, dtype=dtype), normal(B, K - 1, E, dtype=dtype), normal(K, E), normal(E)
    documents = np.cumsum(rng.random((B, T + K - 1)) < 1 / 3, axis=1)
    seen = [documents[:, j : j + T] == documents[:, K - 1 :] for j in range(K)]
    return arrays, (normal(B, T, E, dtype=dtype),), jnp.asarray(np.stack(seen, axis=1)[:, :-1])


def several(*arrays, **how):
    """As the common checks want it: several outputs."""
    return (short_conv(*arrays, **how),)


def of(seen):
    return partial(several, seen=seen)


def errors(kernels, shape, dtype, documents):
    """Of the output, and of the gradients of x, past, taps and bias."""
    arrays, cotangents, seen = inputs(*shape, dtype=dtype)
    run = of(seen if documents else None)
    return common.errors(run, partial(run, kernels="reference"), kernels, arrays, cotangents)
