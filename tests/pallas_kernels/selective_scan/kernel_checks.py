"""What the kernels for every kind of device have to do, interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.selective_scan import selective_scan
from tests.pallas_kernels import kernel_checks as common
from tests.pallas_kernels.kernel_checks import distance, values_and_gradients


def inputs(B, T, E, N, dtype=jnp.float32, rates="mild", seed=0):
    rng = np.random.default_rng(seed)
    low, high = {"mild": (1e-3, 1.0), "fast": (5.0, 60.0), "still": (0.0, 1e-6)}[rates]

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    u, dt = normal(B, T, E, dtype=dtype), jnp.float32(rng.uniform(low, high, size=(B, T, E)))
    A = -jnp.float32(rng.uniform(0.3, 3.0, size=(E, N)))
    arrays = u, dt, A, normal(B, T, N, dtype=dtype), normal(B, T, N, dtype=dtype), normal(B, E, N)
    return arrays, (normal(B, T, E, dtype=dtype), normal(B, E, N)), jnp.asarray(rng.random((B, T)) < 0.1)


def raw_steps(arrays, dtype, seed=3):
    """As `inputs` says, with raw steps, some of them far out, and their bias behind the rest."""
    rng = np.random.default_rng(seed)
    u, dt, *rest = arrays
    raw = rng.normal(size=dt.shape, scale=2.0)
    raw.flat[::7], raw.flat[3::11] = -30.0, 20.0
    return u, jnp.asarray(raw, dtype), *rest, jnp.float32(rng.uniform(-7, -2, size=u.shape[2]))


def with_bias(u, dt, A, B, C, state, bias, **how):
    return selective_scan(u, dt, A, B, C, state, how.pop("reset", None), bias, **how)


def equals_the_reference(kernels, shape, dtype, rates, documents, raw=None):
    arrays, cotangents, reset = inputs(*shape, dtype, rates)
    reset = reset if documents else None
    f = partial(selective_scan, reset=reset)
    if raw is not None:
        arrays, f = raw_steps(arrays, raw), partial(with_bias, reset=reset)
    with dispatch.interpreted():
        got = values_and_gradients(partial(f, kernels=kernels), arrays, cotangents, kernels)
    arrays32, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, cotangents))
    want = values_and_gradients(partial(f, kernels="reference"), arrays32, cotangents, "reference")
    for a, b, like in zip(got, want, (arrays[0], arrays[5], *arrays), strict=True):
        assert a.dtype == like.dtype
        rough = 4e-3 if a.dtype == jnp.bfloat16 else 2e-6
        assert distance(a, b) <= rough * float(jnp.linalg.norm(b)) + 1e-30


def a_population_equals_its_members(kernels, shared):
    """Some inputs may be the same for all members. 6 is the bias of raw steps."""
    members = [inputs(1, 3, 8, 8, seed=s)[:2] for s in (1, 2)]
    if 6 not in shared:
        return common.a_population_equals_its_members(selective_scan, kernels, members, shared, 1e-6)
    members = [(raw_steps(arrays, jnp.float32, seed=s), cotangents) for s, (arrays, cotangents) in enumerate(members)]
    return common.a_population_equals_its_members(with_bias, kernels, members, shared, 1e-6)


def lowered_gradients(kernels, platform, dtype, N, documents):
    """Of two layers at training shapes, with rematerialisation."""
    B, T, E = 4, 4096, 2048
    shapes = [((B, T, E), dtype), ((B, T, E), jnp.float32), ((E, N), jnp.float32), *[((B, T, N), dtype)] * 2]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    reset = [jax.ShapeDtypeStruct((B, T), bool)] if documents else []

    def loss(u, *a):
        def layer(u, _):
            return selective_scan(u, *a[:4], None, *a[4:], kernels=kernels)[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(jax.jit(layer)), u, length=2)[0].astype(jnp.float32))

    return common.exported(jax.jit(jax.grad(loss, argnums=range(5))), (*args, *reset), platform)
