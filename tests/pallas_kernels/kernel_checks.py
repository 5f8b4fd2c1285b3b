"""What kernels of every operation are held against."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from pallas_kernels import dispatch

GATES = {  # log decays
    "mild": (-0.3, 0.0), "closed": (-60.0, -20.0), "open": (-1e-6, 0.0), "mixed": (-40.0, 0.0), "none": (0.0, 0.0),
}  # fmt: skip


def cotangents_of(v, state, rng):
    """Of outputs like v, and of the state after them."""
    return tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in (v, state))


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
    """Never NaN, which Python's `max` may pass over."""
    found = float(jnp.linalg.norm(a.astype(jnp.float32) - b))
    assert math.isfinite(found)
    return found


def errors(op, definition, kernels, arrays, cotangents, floor=1e-4):
    """||got - want|| / ||want|| of the outputs, which are like the cotangents, and of all gradients, the definition's
    in float32. A ||want|| below the floor counts as that."""
    with dispatch.interpreted():
        got = values_and_gradients(partial(op, kernels=kernels), arrays, cotangents, kernels)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (tuple(arrays), cotangents))
    want = values_and_gradients(definition, *exact, "reference")
    for a, like in zip(got, (*cotangents, *arrays), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
    return [distance(a, b) / max(float(jnp.linalg.norm(b)), floor) for a, b in zip(got, want, strict=True)]


# JAX does not promise what layouts, which mLSTM asks for, will mean to a later one.
UNSTABLE = [export.DisabledSafetyCheck.custom_call("LayoutConstraint")]


def exported(f, args, platform):
    """The program for a platform that need not be there; f is jitted."""
    return export.export(f, platforms=[platform], disabled_checks=UNSTABLE)(*args).mlir_module()


def cuda_calls(run, args):
    """How many Mosaic GPU kernels are in (out, final) = run(*args) for CUDA; and in its gradient under remat."""
    return _calls(run, args, "cuda", "custom_call @mosaic_gpu")


def tpu_calls(run, args, kernel):
    """As `cuda_calls`, of kernels of that name for a TPU."""
    return _calls(run, args, "tpu", f'kernel_name = "{kernel}"')


def _calls(run, args, platform, mark):
    def loss(*a):
        out, final = run(*a)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(final)

    def count(f):
        return exported(jax.jit(f), args, platform).count(mark)

    real = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]
    return count(loss), count(jax.grad(jax.checkpoint(loss), argnums=real))


def waits_for_its_first_measurement(op, f, arrays, monkeypatch):
    """On a TPU `f`, which is `op`, runs as plain XLA until its kernel was measured on one."""
    monkeypatch.setattr(dispatch, "device", lambda: dispatch.Device("tpu", "TPU v5e"))
    for unmeasured, chosen in ((dispatch.UNMEASURED, "xla"), (set(), "mosaic_tpu")):
        monkeypatch.setattr(dispatch, "UNMEASURED", unmeasured)
        with dispatch.listening() as heard:
            jax.eval_shape(lambda *a: f(*a), *arrays)  # traced anew
        assert [(op, choice.implementation) for op, choice in heard] == [(op, chosen)]


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
