"""The kernels for Hopper GPUs, interpreted, against the definition; and lowered for a GPU at the shapes of training."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels import grouped_matmul as gmm
from pallas_kernels.dispatch import Device
from tests.pallas_kernels.kernel_checks import exported

needs_interpreter = pytest.mark.skipif(
    not compat.MOSAIC_GPU, reason=f"Mosaic GPU kernels need JAX {compat.MOSAIC_GPU_SINCE}"
)
BF16 = jnp.bfloat16
HOPPER = Device("gpu", "NVIDIA H100 80GB HBM3", "9.0")


def inputs(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), BF16)


def with_gradients(f):
    """(x, w, group or sizes, dy) -> (y, dx, dw)"""

    def all_of(x, w, groups, dy):
        y, pull = jax.vjp(lambda x, w: f(x, w, groups), x, w)
        return y, *pull(dy)

    return all_of


def compare(f, x, w, groups, dy, batched=lambda run: run):
    """The kernels of `f`, values and gradients, against its definition in float32."""
    with dispatch.interpreted():
        got = batched(with_gradients(partial(f, kernels="mosaic_gpu")))(x, w, groups, dy)
    exact = (a.astype(jnp.float32) for a in (x, w))
    want = batched(with_gradients(partial(f, kernels="reference")))(*exact, groups, dy.astype(jnp.float32))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == BF16
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        assert np.linalg.norm(a - b) <= 3e-3 * np.linalg.norm(b)


@needs_interpreter
@pytest.mark.parametrize(
    ("sizes", "rows", "D", "F"),
    [
        # Edges inside of tiles and steps, an empty group, rows past the sum; tiles of an odd number of chunks.
        ([100, 0, 150, 30], 300, 64, 192),
        ([0, 1, 2, 0, 3], 6, 16, 32),  # fewer rows than a tile, than a step, than a unit of TMA
        ([1], 1, 48, 16),
        ([0, 0], 9, 32, 32),  # no rows at all
        ([40], 64, 96, 352),  # two tiles of columns
    ],
)
def test_ragged_rows(sizes, rows, D, F):
    x, w, dy = inputs(rows, D), inputs(len(sizes), D, F, seed=2), inputs(rows, F, seed=3)
    compare(gmm.ragged_matmul, x, w, jnp.asarray(sizes, jnp.int32), dy)


@needs_interpreter
def test_tiles():
    group = jnp.asarray([0, 2, 2, 3], jnp.int32)  # group 1 is empty, the last tile is of none, and zero
    x, dy = inputs(4, gmm.KERNEL_TILE, 32).at[3].set(0), inputs(4, gmm.KERNEL_TILE, 48, seed=3)
    compare(gmm.grouped_matmul, x, inputs(3, 32, 48, seed=2), group, dy)


@needs_interpreter
@pytest.mark.parametrize("own", [True, False], ids=["own matrices", "shared matrices"])
def test_a_population(own):
    """Runs side by side, each with its sizes; matrices of their own, or the same ones (their gradients are summed
    after)."""
    sizes = jnp.asarray([[10, 0], [3, 9]], jnp.int32)
    x, dy = inputs(2, 14, 16), inputs(2, 14, 32, seed=3)
    w = inputs(2, 2, 16, 32, seed=2) if own else inputs(2, 16, 32, seed=2)
    compare(gmm.ragged_matmul, x, w, sizes, dy, lambda run: jax.vmap(run, in_axes=(0, 0 if own else None, 0, 0)))


@needs_interpreter
@pytest.mark.parametrize(
    ("G", "M", "D", "F"), [(8, 32768, 1024, 2816), (64, 131072, 1024, 352), (64, 131072, 384, 1024)]
)
def test_lowering_at_the_shapes_of_training(G, M, D, F):
    """With gradients, made anew in the backward pass."""
    run = jax.checkpoint(partial(gmm.ragged_matmul, kernels="mosaic_gpu"))
    grads = jax.grad(lambda x, w, sizes: jnp.sum(jnp.sin(run(x, w, sizes))), argnums=(0, 1))
    shapes = [jax.ShapeDtypeStruct(s, BF16) for s in ((M, D), (G, D, F))]
    text = exported(jax.jit(grads), (*shapes, jax.ShapeDtypeStruct((G,), jnp.int32)), "cuda")
    assert "grouped_product" in text
    assert "grouped_outer" in text


@needs_interpreter
@pytest.mark.parametrize(("n", "D"), [(40, 16), (7, 832), (3, 4096)])
def test_rows_are_copied(n, D):
    """Some of them twice, and zeros for those beyond the end; in numbers that no block of rows divides; in a
    population, whose members share rows or indices."""
    from pallas_kernels.grouped_matmul import gpu_rows

    x, index = inputs(2, n, D), jnp.asarray(np.random.default_rng(0).integers(0, n + 2, (2, 11, 3)), jnp.int32)
    assert (index >= n).any()
    for axes in ((0, 0), (0, None), (None, 0)):
        args = [a if axis == 0 else a[0] for a, axis in zip((x, index), axes, strict=True)]
        with dispatch.interpreted():
            got = jax.vmap(gpu_rows.gather, in_axes=axes)(*args)
        want = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0), in_axes=axes)(*args)
        np.testing.assert_array_equal(got, want)


@needs_interpreter
def test_tiles_of_rows_are_copied_in_any_order():
    """Whose first rows come in another order than they do, some of them of none."""
    from pallas_kernels.grouped_matmul import gpu_rows

    x, index = inputs(7, 832), jnp.asarray(np.random.default_rng(2).integers(0, 7, 4 * gpu_rows.TILE - 50), jnp.int32)
    index = index.at[:: gpu_rows.TILE].set(jnp.asarray([5, 9, 0, 5])).at[3 * gpu_rows.TILE :].set(9)
    with dispatch.interpreted():
        got = gpu_rows.gather(x, index)
    np.testing.assert_array_equal(got, jnp.take(x, index, axis=0, mode="fill", fill_value=0))


@needs_interpreter
def test_copies_of_rows_lower_at_the_shapes_of_training():
    from pallas_kernels.grouped_matmul import gpu_rows

    shapes = jax.ShapeDtypeStruct((16384, 832), BF16), jax.ShapeDtypeStruct((1087, 128), jnp.int32)
    assert "gather_rows" in exported(jax.jit(gpu_rows.gather), shapes, "cuda")


# ------------------------------------------------------------------------------------ the choice


def test_which_form_runs(monkeypatch):
    x, w, sizes = inputs(8, 32), inputs(2, 32, 48), jnp.asarray([3, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a CPU's best form is the plain one
        assert gmm.choose(x, w) == "xla"
    monkeypatch.setattr(dispatch, "device", lambda: HOPPER)
    if compat.MOSAIC_GPU:
        assert gmm.choose(x, w) == "mosaic_gpu"
    else:
        with pytest.raises(dispatch.Unsupported, match="needs JAX"):
            gmm.ragged_matmul(x, w, sizes, kernels="mosaic_gpu")


@needs_interpreter
@pytest.mark.parametrize(
    ("x", "w", "reason"),
    [
        (jnp.zeros((8, 32)), jnp.zeros((2, 32, 48)), "takes bfloat16, not float32 with float32"),
        (inputs(8, 32), inputs(2, 32, 40), "multiples of 16, not 32 x 40"),
        (inputs(2, 64, 32), inputs(2, 32, 48), "takes tiles of 128 rows, not 64"),
        (inputs(0, 32), inputs(2, 32, 48), "takes no empty arrays"),
    ],
)
def test_refusals(x, w, reason, monkeypatch):
    with pytest.raises(dispatch.Unsupported, match=reason):
        gmm.choose(x, w, "mosaic_gpu")
    monkeypatch.setattr(dispatch, "device", lambda: HOPPER)
    dispatch._warn_once.cache_clear()
    with pytest.warns(dispatch.Fallback, match=reason):
        assert gmm.choose(x, w) == "xla"


def gate_problem(rows, F, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    both, d = (3 * jax.random.normal(k, (rows, n), jnp.bfloat16) for k, n in zip(keys, (2 * F, F), strict=False))
    return both, jax.random.uniform(keys[2], (rows,)).at[rows // 3 :: 7].set(0.0), d


def gate_gradients(form):
    def run(both, w, d):
        return jax.vjp(lambda *a: gmm.weighted_swiglu(*a, form), both, w)[1](d)

    return run


@needs_interpreter
@pytest.mark.parametrize(("rows", "F"), [(8, 64), (88, 192), (64, 320), (16, 832)])
def test_the_gates_gradients(rows, F):
    both, w, d = gate_problem(rows, F)
    with dispatch.interpreted():
        got = gate_gradients("mosaic_gpu")(both, w, d)
    want = gate_gradients("xla")(both.astype(jnp.float32), w, d.astype(jnp.float32))
    for a, b, limit in zip(got, want, (2e-3, 1e-6), strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) <= limit * jnp.linalg.norm(b)
    assert not jnp.any(got[0][w == 0])


@needs_interpreter
def test_the_gates_gradients_of_a_population_and_of_what_does_not_fit():
    both, w, d = (jnp.stack(pair) for pair in zip(gate_problem(64, 64), gate_problem(64, 64, seed=1), strict=True))
    with dispatch.interpreted():
        together = jax.vmap(gate_gradients("mosaic_gpu"))(both, w, d)
        for i in range(2):
            for a, b in zip(together, gate_gradients("mosaic_gpu")(both[i], w[i], d[i]), strict=True):
                np.testing.assert_array_equal(a[i], b)
        for odd in (gate_problem(64, 40), gate_problem(60, 64)):
            for a, b in zip(*(gate_gradients(form)(*odd) for form in ("mosaic_gpu", "xla")), strict=True):
                np.testing.assert_array_equal(a, b)
