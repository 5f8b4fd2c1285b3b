import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul as gmm
from pallas_kernels.grouped_matmul.reference import rows_matmul


def inputs(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tile", [1, 4, 0])
@pytest.mark.parametrize("sizes", [[5, 0, 7, 1], [0, 0, 13, 0], [4, 4, 4, 4], [0, 0, 0, 1]])
def test_grouped_products_are_those_of_the_rows(sizes, tile):
    group = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [*sizes, 3]))  # 3 rows go nowhere
    x, w = inputs(len(group), 6), inputs(4, 6, 5, seed=2)

    def tiled(x, w):
        plan = gmm.layout(jnp.asarray(group), 4, tile)
        return gmm.collect(gmm.grouped_matmul(gmm.spread(x, plan), w, plan.group), plan)

    with jax.default_matmul_precision("highest"):
        close(tiled(x, w), rows_matmul(x, w, group))
        probe = inputs(len(group), 5, seed=3)
        got, want = (jax.grad(lambda x, w, f=f: jnp.vdot(f(x, w), probe), argnums=(0, 1))(x, w)
                     for f in (tiled, lambda x, w: rows_matmul(x, w, group)))  # fmt: skip
    jax.tree.map(close, got, want)
    plan = gmm.layout(jnp.asarray(group), 4, tile)
    source = np.asarray(plan.source)
    for e in range(4):  # rows keep their order, and every tile has rows of one group
        rows = source[np.asarray(plan.group) == e].ravel()
        np.testing.assert_array_equal(rows[rows < len(group)], np.flatnonzero(group == e))


def test_tiles_suffice_in_the_worst_case_and_no_more():
    for rows, groups, tile in ((9, 4, 4), (3, 8, 4), (16, 4, 4), (1, 1, 8), (17, 3, 5), (40, 7, 1)):
        worst = [0] + [-math.inf] * rows  # of so many rows in the groups so far
        for _ in range(groups):
            worst = [max(worst[n - s] + math.ceil(s / tile) for s in range(n + 1)) for n in range(rows + 1)]
        assert gmm.tiles(rows, groups, tile) == worst[rows]
    assert gmm.padded_rows(2, 16) == 2  # decoding reads the chosen experts only
    assert gmm.padded_rows(8192, 16) < 1.2 * 8192


def test_bfloat16_and_many_at_a_time():
    group = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 20)), jnp.int32)
    x, w = inputs(2, 20, 16), inputs(3, 16, 8, seed=2)

    def tiled(x, w, group):
        plan = gmm.layout(group, 3, 4)
        return gmm.collect(gmm.grouped_matmul(gmm.spread(x, plan), w, plan.group), plan).astype(x.dtype)

    want = jnp.stack([rows_matmul(x[i], w, group[i]) for i in range(2)])
    both = jax.vmap(tiled, in_axes=(0, None, 0))
    with jax.default_matmul_precision("highest"):
        close(both(x, w, group), want)
        got = jax.grad(lambda w: jnp.sum(both(x, w, group) ** 2))(w)
        close(got, jax.grad(lambda w: sum(jnp.sum(rows_matmul(x[i], w, group[i]) ** 2) for i in range(2)))(w))
    low = both(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), group)
    assert low.dtype == jnp.bfloat16
    assert float(jnp.abs(low - want).max()) < 0.03 * float(jnp.abs(want).max())


@pytest.mark.parametrize("form", ["xla", "reference"])
@pytest.mark.parametrize(("rows", "sizes"), [(12, [5, 0, 7]), (1, [0, 0, 1]), (40, [1, 30, 2])])
def test_ragged_rows(form, rows, sizes):
    """Row by row in NumPy; rows past the sum are zero, and have no part in any gradient."""
    x, w, dy = inputs(rows, 6), inputs(3, 6, 5, seed=2), inputs(rows, 5, seed=3)
    y, pull = jax.vjp(lambda x, w: gmm.ragged_matmul(x, w, jnp.asarray(sizes), kernels=form), x, w)
    want = np.zeros((rows, 5)), np.zeros((rows, 6)), np.zeros((3, 6, 5))
    for r, g in enumerate(np.repeat(np.arange(3), sizes)):
        want[0][r] = x[r] @ w[g]
        want[1][r] = w[g] @ dy[r]
        want[2][g] += np.outer(x[r], dy[r])
    jax.tree.map(close, (y, *pull(dy)), want)
