"""What every form of the gated norm is held against."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_norm import gated_norm
from tests.pallas_kernels import kernel_checks as common

EPS = 1e-5


def inputs(B, T, E, H, *, dtype=jnp.float32, seed=0):
    """y, u, z, skip, gain; and the cotangent."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arrays = [normal(B, T, E, dtype=dtype) for _ in "yuz"]
    return (*arrays, normal(H), 1 + normal(E)), (normal(B, T, E, dtype=dtype),)


def several(*arrays, groups=1, **how):
    """As the common checks want it: several outputs."""
    return (gated_norm(*arrays, groups=groups, eps=EPS, **how),)


def whole(*arrays, **how):
    """With all heads in one group; `arrays` end with documents, of which it knows nothing."""
    return several(*arrays[:5], **how)


def errors(kernels, shape, dtype, groups):
    """Of the output, and of the gradients of y, u, z, skip and gain."""
    arrays, cotangents = inputs(*shape, dtype=dtype)
    run = partial(several, groups=groups)
    return common.errors(run, partial(run, kernels="reference"), kernels, arrays, cotangents)
