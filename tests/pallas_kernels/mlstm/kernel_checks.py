"""What the kernels for every kind of device have to do, interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.mlstm import State, mlstm
from tests.pallas_kernels import kernel_checks as common
from tests.pallas_kernels.kernel_checks import distance, values_and_gradients


def inputs(T, B=1, dk=64, dv=64, gates="mild", dtype=jnp.bfloat16, seed=0):
    """(q, k, v, i, f), the state, cotangents of h, C and n, documents."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype, mean=0.0):
        return jnp.asarray(rng.normal(mean, size=shape), dtype)

    (i0, i1), (f0, f1) = {
        "mild": ((-2, 2), (0, 4)),
        "start": ((-10, -10), (3, 6)),  # |n . q| is far below the bound
        "extreme": ((-15, 15), (-15, 15)),
    }[gates]
    # With a mean, so that the normaliser stays away from 0, where products of rounded numbers would be lost.
    q, k = normal(B, T, 1, dk, mean=0.4), normal(B, T, 1, dk, mean=0.4)
    i, f = (jnp.float32(rng.uniform(*ends, size=(B, T, 1))) for ends in ((i0, i1), (f0, f1)))
    state = State(
        normal(B, 1, dk, dv, dtype=jnp.float32),
        normal(B, 1, dk, dtype=jnp.float32, mean=1.0),
        normal(B, 1, dtype=jnp.float32),
    )
    cotangents = normal(B, T, 1, dv), normal(B, 1, dk, dv, dtype=jnp.float32), normal(B, 1, dk, dtype=jnp.float32)
    arrays = q, k, normal(B, T, 1, dv), i, f
    return arrays, state, cotangents, jnp.asarray(rng.random((B, T)) < 0.05).at[:, T // 2].set(True)


def equals_the_reference(kernels, shape, gates, documents, rough):
    arrays, state, cotangents, reset = inputs(**shape, gates=gates)
    reset = reset if documents else None
    no_m = jnp.zeros_like(state.m)  # h does not depend on it

    def run(kernels, arrays, d_h, *d_state):
        f = partial(mlstm, reset=reset, kernels=kernels)
        return values_and_gradients(f, (*arrays, state), (d_h, State(*d_state, no_m)), kernels)

    with dispatch.interpreted():
        got = run(kernels, arrays, *cotangents)
    want = run("reference", [a.astype(jnp.float32) for a in arrays], *(a.astype(jnp.float32) for a in cotangents))
    *got, d_m = got
    *want, true_d_m = want
    for a, b, like in zip(got, want, (arrays[2], *state, *arrays, *state[:2]), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
        assert distance(a, b) <= rough * float(jnp.linalg.norm(b)) + 2e-5
    # a sum of products with the state that cancel
    assert abs(float((d_m - true_d_m).squeeze())) <= 6e-3 * float(jnp.linalg.norm(state.C) * jnp.linalg.norm(got[-2]))


def a_population_equals_its_members(kernels, given):
    """With one q for all. Those `given` a state have each its own, and gradients through the last one too."""
    members = []
    for arrays, state, cotangents, _ in (inputs(8, seed=s) for s in (1, 2)):
        members.append(((*arrays, *state), cotangents) if given else (arrays, cotangents[:1]))

    def op(q, k, v, i, f, *state, kernels):
        h, after = mlstm(q, k, v, i, f, State(*state) if given else None, kernels=kernels)
        return (h, after.C, after.n) if given else (h,)

    common.a_population_equals_its_members(op, kernels, members, (0,), 1e-5)


def lowered_gradients(kernels, platform, dtype=jnp.bfloat16):
    """Of two layers at training shapes, with rematerialisation."""
    B, T, H, dk, dv = 4, 8192, 8, 256, 512
    args = [jax.ShapeDtypeStruct((B, T, H, d), dtype) for d in (dk, dk, dv)]
    args += [jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2

    def loss(q, k, v, i, f):
        def layer(v, _):
            return mlstm(q, k, v, i, f, kernels=kernels)[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(jax.jit(layer)), v, length=2)[0].astype(jnp.float32))

    return common.exported(jax.jit(jax.grad(loss, argnums=range(5))), args, platform)
