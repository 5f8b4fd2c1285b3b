"""What kernels of every operation are held against."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch


def compiled(f, kernels):
    """Of TPUs' kernels a program takes less time to interpret than its operations one by one. The interpreter of GPUs'
    has one state for all kernels, and may hang where a program runs two at once."""
    return f if kernels == "mosaic_gpu" else jax.jit(f)


def values_and_gradients(f, arrays, cotangents, kernels):
    """All outputs, then the gradients of all arrays."""

    def both(arrays, cotangents):
        out, pull = jax.vjp(f, *arrays)
        return jax.tree.leaves((out, pull(cotangents)))

    return compiled(both, kernels)(arrays, cotangents)


def distance(a, b):
    return float(jnp.linalg.norm(a.astype(jnp.float32) - b))


def a_population_equals_its_members(op, kernels, members, shared, tolerance):
    """Of `op(*arrays, kernels=)`. `members`: (arrays, cotangents) of each. Arrays at the positions `shared` are the
    first one's for all."""
    stacked = [
        column[0] if i in shared else jnp.stack(column)
        for i, column in enumerate(zip(*(arrays for arrays, _ in members), strict=True))
    ]
    cotangents = jax.tree.map(lambda *a: jnp.stack(a), *(cotangents for _, cotangents in members))
    axes = [None if i in shared else 0 for i in range(len(stacked))]

    def run(cotangents, *arrays):
        return values_and_gradients(partial(op, kernels=kernels), arrays, cotangents, kernels)

    run = compiled(run, kernels)
    with dispatch.interpreted():
        together = jax.vmap(run, in_axes=(0, *axes))(cotangents, *stacked)
        for k, (arrays, own) in enumerate(members):
            alone = run(own, *(members[0][0][i] if i in shared else a for i, a in enumerate(arrays)))
            for a, b in zip(together, alone, strict=True):
                a, b = (np.asarray(x, np.float32) for x in (a[k], b))
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
