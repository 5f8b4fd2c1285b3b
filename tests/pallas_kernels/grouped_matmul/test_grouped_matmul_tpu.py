"""JAX's kernels for TPUs, interpreted, against the definition; and lowered for a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import grouped_matmul as gmm
from tests.pallas_kernels.kernel_checks import exported


def inputs(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_gradients(f):
    def all_of(x, w, groups, dy):
        y, pull = jax.vjp(lambda x, w: f(x, w, groups), x, w)
        return y, *pull(dy)

    return all_of


def compare(f, *arrays, batched=lambda run: run):
    with dispatch.interpreted():
        got = batched(with_gradients(partial(f, kernels="mosaic_tpu")))(*arrays)
    want = batched(with_gradients(partial(f, kernels="reference")))(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), got, want)


@pytest.mark.parametrize(("sizes", "rows"), [([100, 0, 60], 200), ([0, 0, 1], 1), ([0, 0, 0], 8)])
def test_ragged_rows(sizes, rows):
    """Edges inside of tiles, empty groups, rows past the sum, no rows at all."""
    x, w, dy = inputs(rows, 128), inputs(3, 128, 256, seed=2), inputs(rows, 256, seed=3)
    compare(gmm.ragged_matmul, x, w, jnp.asarray(sizes, jnp.int32), dy)


def test_tiles():
    group = jnp.asarray([0, 2, 2, 3], jnp.int32)
    x, dy = inputs(4, gmm.KERNEL_TILE, 128).at[3].set(0), inputs(4, gmm.KERNEL_TILE, 128, seed=3)
    compare(gmm.grouped_matmul, x, inputs(3, 128, 128, seed=2), group, dy)


def test_a_population():
    x, w, dy = inputs(2, 30, 128), inputs(2, 128, 128, seed=2), inputs(2, 30, 128, seed=3)
    sizes = jnp.asarray([[10, 20], [0, 9]], jnp.int32)
    compare(gmm.ragged_matmul, x, w, sizes, dy, batched=lambda run: jax.vmap(run, in_axes=(0, None, 0, 0)))


def test_lowering():
    run = jax.checkpoint(partial(gmm.ragged_matmul, kernels="mosaic_tpu"))
    grads = jax.grad(lambda x, w, sizes: jnp.sum(jnp.sin(run(x, w, sizes))), argnums=(0, 1))
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((32768, 1024), (8, 1024, 2816))]
    text = exported(jax.jit(grads), (*shapes, jax.ShapeDtypeStruct((8,), jnp.int32)), "tpu")
    assert text.count("tpu_custom_call") >= 3


def test_refusals():
    w = inputs(2, 128, 96)
    with pytest.raises(dispatch.Unsupported, match="multiples of 128, not 128 x 96"):
        gmm.choose(inputs(8, 128), w, "mosaic_tpu")
    with pytest.raises(dispatch.Unsupported, match="not float16 with float32"):
        gmm.choose(inputs(8, 128).astype(jnp.float16), w, "mosaic_tpu")
