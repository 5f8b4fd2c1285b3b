"""What the kernels for every kind of device have to do, interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.gated_recurrence import gated_recurrence
from tests.pallas_kernels import kernel_checks as common
from tests.pallas_kernels.kernel_checks import distance, values_and_gradients


def inputs(T, B=1, G=1, H=1, dk=64, dv=64, gates="mild", dtype=jnp.bfloat16, seed=0):
    """(q, k, v, log_decay, state), the cotangents, documents."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    g = jnp.float32(rng.uniform(*common.GATES[gates], size=(B, T, H)))
    state = normal(B, H, dk, dv, dtype=jnp.float32)
    arrays = normal(B, T, G, dk) * dk**-0.5, normal(B, T, G, dk) * dk**-0.5, normal(B, T, H, dv), g, state
    cotangents = normal(B, T, H, dv), normal(B, H, dk, dv, dtype=jnp.float32)
    return arrays, cotangents, jnp.asarray(rng.random((B, T)) < 0.05).at[:, T // 2].set(True)


def equals_the_reference(kernels, shape, gates, documents, rough=5e-3, floor=1e-6, weighted=False):
    arrays, cotangents, reset = inputs(**shape, gates=gates)
    reset = reset if documents else None
    if weighted:  # from next to nothing to above 1, as Mamba-2's steps are
        weight = jnp.float32(np.exp(np.random.default_rng(5).uniform(-9, 1, size=arrays[3].shape)))
        arrays = (*arrays, weight)

    def f(q, k, v, g, state, weight=None, **how):
        return gated_recurrence(q, k, v, g, state, reset, weight, **how)

    with dispatch.interpreted():
        got = values_and_gradients(partial(f, kernels=kernels), arrays, cotangents, kernels)
    arrays32, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, cotangents))
    want = values_and_gradients(partial(f, kernels="reference"), arrays32, cotangents, "reference")
    for a, b, like in zip(got, want, (arrays[2], arrays[4], *arrays), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
        assert distance(a, b) <= rough * float(jnp.linalg.norm(b)) + floor


def a_population_equals_its_members(kernels, shared):
    """Some inputs may be the same for all members."""
    members = [inputs(8, seed=s)[:2] for s in (1, 2)]
    common.a_population_equals_its_members(gated_recurrence, kernels, members, shared, 1e-5)


def lowered(kernels, platform, G, H, dk, dv, documents, dtype=jnp.bfloat16):
    """The programs of two layers, at training shapes, and of their gradients with rematerialisation."""
    B, T = 4, 4096
    shapes = [(B, T, G, dk), (B, T, G, dk), (B, T, H, dv)]
    args = [*(jax.ShapeDtypeStruct(s, dtype) for s in shapes), jax.ShapeDtypeStruct((B, T, H), jnp.float32)]
    args += [jax.ShapeDtypeStruct((B, T), bool)] if documents else []

    def loss(q, k, v, g, *reset):
        def layer(v, _):
            return gated_recurrence(q, k, v, g, None, *reset, kernels=kernels)

        out, finals = jax.lax.scan(jax.checkpoint(jax.jit(layer)), v, length=2)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(finals)

    def text(f):
        return common.exported(jax.jit(f), args, platform)

    return text(loss), text(jax.grad(loss, argnums=range(4)))
