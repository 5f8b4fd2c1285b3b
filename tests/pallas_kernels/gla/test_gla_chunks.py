"""The kernels for what GLA's walk needs, interpreted, against the plain form in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.gla import reference, xla
from tests.pallas_kernels import kernel_checks as checks
from tests.pallas_kernels.gla.kernel_checks import inputs

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)
from pallas_kernels.gla import gpu
from pallas_kernels.gla import gpu_chunks as chunks


def wide(a):
    return jnp.pad(a, (*((0, 0),) * (a.ndim - 1), (0, -a.shape[-1] % chunks.L)))


def plain(q, k, g, reset):
    """As the kernels give it: widths padded, with channels that keep all."""
    v = jnp.zeros((*q.shape[:3], 1))
    read, write, _, weights, carried = xla.in_chunks(q, k, v, g, reset, chunks.L)
    last = 0 if reset is None else xla.documents(reset, chunks.L)[..., -1:]
    kept = jnp.broadcast_to(jnp.where(last == 0, 1.0, 0.0), (*carried.shape[:3], wide(carried).shape[-1]))
    return wide(read), wide(write), weights, kept.at[..., : carried.shape[-1]].set(carried)


def errors(q, k, g, reset):
    """||got - want|| / ||want|| of what `in_chunks` gives, and of the gradients of q, k and g."""
    rng = np.random.default_rng(7)
    with dispatch.interpreted():
        out, pull = jax.vjp(lambda *a: chunks.in_chunks(*a, reset), q, k, g)
        cotangents = tuple(jnp.asarray(rng.normal(size=a.shape), jnp.bfloat16).astype(a.dtype) for a in out)
        got = (*out, *pull(cotangents))
    given, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), ((q, k, g), cotangents))
    out, pull = jax.vjp(lambda *a: plain(*a, reset), *given)
    want = (*out, *pull(cotangents))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
    return [checks.distance(a, b) / max(float(jnp.linalg.norm(b)), 1e-4) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 70, "H": 2}, "mild", True),  # a chunk and 6 tokens
        ({"T": 66, "dk": 128}, "mixed", False),  # keys in two blocks
        ({"T": 64}, "none", True),
        ({"T": 9, "dk": 24}, "closed", False),  # widths are padded
        ({"T": 1}, "open", False),
    ],
)
def test_equals_the_plain_form_in_values_and_all_gradients(shape, gates, documents):
    (q, k, _, g, _), _, reset = inputs(**shape, gates=gates)
    read, write, weights, carried, *gradients = errors(q, k, g, reset if documents else None)
    assert max(read, write, weights) <= 2.5e-3  # rounded to bfloat16
    assert carried <= 1e-6
    assert max(gradients) <= 4e-3


def test_a_walk_over_chunks_that_xla_prepared():
    """What "auto" runs until the kernels here have been measured."""
    arrays, cotangents, reset = inputs(66, dk=24, dv=40)

    def run(*a, kernels):
        return gpu.gla(*a, reset, kernels="xla" if kernels == "mosaic_gpu" else kernels)

    found = checks.errors(run, lambda *a: reference.gla(*a, reset), "mosaic_gpu", arrays, cotangents)
    assert max(found[:2]) <= 4e-3
    assert max(found[2:]) <= 6e-3
