"""What the kernels for every kind of device have to do, interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.slstm import State, slstm
from tests.pallas_kernels.kernel_checks import distance, exported, values_and_gradients


def inputs(B, T, H, d, scale=1.0, seed=0):
    """R as the kernel rounds it, so that only the order of sums differs."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    def states():
        return State(normal(B, H, d), normal(B, H, d), jnp.abs(normal(B, H, d)) + 1, normal(B, H, d))

    R = (d**-0.5 * normal(4, H, d, d)).astype(jnp.bfloat16).astype(jnp.float32)
    reset = jnp.asarray(rng.random((B, T)) < 0.3)
    return (scale * normal(B, T, H, 4, d), R, states()), (normal(B, T, H, d), states()), reset


def equals_the_plain_form(kernels, shape, documents, scale, rough=2e-5):
    arrays, cotangents, reset = inputs(*shape, scale)
    reset = reset if documents else None
    with dispatch.interpreted():
        got = values_and_gradients(partial(slstm, reset=reset, kernels=kernels), arrays, cotangents, kernels)
    want = values_and_gradients(partial(slstm, reset=reset, kernels="xla"), arrays, cotangents, "xla")
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, jnp.float32)
        assert distance(a, b) <= rough * float(jnp.linalg.norm(b)) + 1e-30


def a_population_equals_its_members(kernels, shared):
    """Some inputs may be the same for all members."""
    names = ("gates", "R", "state", "reset")
    members = [inputs(1, 2, 1, 64, seed=s) for s in (1, 2)]
    args = [(*arrays, reset) for arrays, _, reset in members]
    dh = members[0][1]
    axes = [None if name in shared else 0 for name in names]
    stacked = [
        args[0][i] if name in shared else jax.tree.map(lambda *a: jnp.stack(a), *(m[i] for m in args))
        for i, name in enumerate(names)
    ]

    def run(form, gates, R, state, reset):
        f = partial(slstm, reset=reset, kernels=form)
        return values_and_gradients(f, (gates, R, state), dh, form)

    with dispatch.interpreted():
        together = jax.vmap(partial(run, kernels), in_axes=axes)(*stacked)
    for k in range(2):
        alone = run("xla", *(args[0 if name in shared else k][i] for i, name in enumerate(names)))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-4)


def lowered_gradients(kernels, platform, d, documents):
    """Of two layers at training shapes, with rematerialisation."""
    B, T, H = 16, 2048, 4
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, H, 4, d), (4, H, d, d))]
    reset = [jax.ShapeDtypeStruct((B, T), bool)] if documents else []

    def loss(gates, R, *reset):
        def layer(gates, _):
            h, _ = slstm(gates, R, None, *reset, kernels=kernels)
            return gates + h[:, :, :, None], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(jax.jit(layer)), gates, length=2)[0])

    return exported(jax.jit(jax.grad(loss, argnums=(0, 1))), (*args, *reset), platform)
