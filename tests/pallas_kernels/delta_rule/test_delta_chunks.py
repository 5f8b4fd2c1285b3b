"""The kernels for what the delta rule's walk needs, interpreted, against the plain form in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.delta_rule import reference, xla
from tests.pallas_kernels import kernel_checks as checks
from tests.pallas_kernels.delta_rule.test_delta_rule_gpu import inputs, of

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)
from pallas_kernels.delta_rule import gpu
from pallas_kernels.delta_rule import gpu_chunks as chunks


def wide(a):
    return jnp.pad(a, (*((0, 0),) * 4, (0, -a.shape[-1] % chunks.L)))


def plain(q, k, v, beta, *rest):
    """As the kernels give it: -W, widths padded."""
    read, write, W, U, weights, carried = xla.in_chunks(q, k, v, beta, *rest, chunks.L)
    return wide(read), wide(write), -wide(W), wide(U), weights, carried


def errors(q, k, v, beta, g, reset):
    """||got - want|| / ||want|| of what `in_chunks` gives, and of the gradients of all that is not None."""
    given = [a for a in (q, k, v, beta, g) if a is not None]
    rng = np.random.default_rng(7)

    def pulled(f, arrays):
        return jax.vjp(lambda q, k, v, beta, g=None: f(q, k, v, beta, g, reset), *arrays)

    with dispatch.interpreted():
        out, pull = pulled(chunks.in_chunks, given)
        noise = [jnp.asarray(rng.normal(size=a.shape), jnp.bfloat16).astype(a.dtype) for a in out]
        widths = (*[k.shape[-1]] * 3, v.shape[-1], chunks.L, 1)  # what is padding has no gradient
        cotangents = tuple(a.at[..., width:].set(0) for a, width in zip(noise, widths, strict=True))
        got = (*out, *pull(cotangents))
    given, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (given, cotangents))
    out, pull = pulled(plain, given)
    want = (*out, *pull(cotangents))
    return [checks.distance(a, b) / max(float(jnp.linalg.norm(b)), 1e-4) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    ("shape", "gates", "highest", "documents"),
    [
        ({"T": 70, "H": 2}, "mild", 2.0, True),  # a chunk and 6 tokens; heads that share a key
        ({"T": 66, "dk": 128}, "mixed", 1.0, False),  # keys in two blocks
        ({"T": 64, "dv": 128}, None, 1.0, True),  # values in two; no decay
        ({"T": 9, "dk": 24, "dv": 40}, "closed", 1.0, False),  # widths are padded
        ({"T": 1}, "open", 1.0, False),
    ],
)
def test_equals_the_plain_form_in_values_and_all_gradients(shape, gates, highest, documents):
    (q, k, v, beta, *rest), _, reset = inputs(**shape, gates=gates, highest=highest)
    *g, _ = rest
    read, write, erase, U, weights, carried, *gradients = errors(
        q, k, v, beta, g[0] if g else None, reset if documents else None
    )
    assert max(read, write, erase, weights) <= 2.5e-3  # rounded to bfloat16
    assert max(U, carried) <= 1e-5
    assert max(gradients) <= 5e-3


def test_one_key_again_and_again_with_beta_2():
    """Where an inverse of 8 bits is off by a third."""
    (q, k, v, beta, _), _, _ = inputs(64, gates=None)
    found = errors(q, jnp.broadcast_to(k[:, :1], k.shape), v, jnp.full_like(beta, 2.0), None, None)
    assert found[3] <= 1e-3  # U
    assert max(found) <= 2e-2


def test_a_walk_over_chunks_that_xla_prepared():
    """What "auto" runs until the kernels here have been measured."""
    arrays, cotangents, reset = inputs(66, dk=24, dv=40, highest=2.0)

    def run(*a, kernels):
        return of(gpu.delta_rule, reset)(*a, kernels="xla" if kernels == "mosaic_gpu" else kernels)

    found = checks.errors(run, of(reference.delta_rule, reset), "mosaic_gpu", arrays, cotangents)
    assert max(found[:2]) <= 4e-3
    assert max(found[2:]) <= 6e-3


def test_refuses_what_does_not_fit_into_shared_memory():
    q, v = jnp.zeros((1, 1, 1, 192)), jnp.zeros((1, 1, 1, 1024), jnp.bfloat16)
    assert chunks.refusal(q, v[..., :512]) == ""
    assert "192 and 1024 take 340 kB of shared memory" in chunks.refusal(q, v)
