"""Every form of every recurrence, of the short convolution, the gated norm and the experts' products, over shapes and
inputs that hypothesis draws, against the definition in float32: values and all gradients. Cross-entropy has its own.

Hypothesis begins with the first of every choice, so that is the awkward one: more than two chunks and no multiple of
them, a document that begins in the first and crosses a whole one, heads that share a key, one of them with open gates,
one with extreme ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import compat, dispatch, mlstm, slstm
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.gated_norm import gated_norm
from pallas_kernels.gated_recurrence import gated_recurrence
from pallas_kernels.gla import gla
from pallas_kernels.grouped_matmul import ragged_matmul
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.short_conv import short_conv
from tests.pallas_kernels import kernel_checks as checks

F32, BF16 = jnp.float32, jnp.bfloat16
UNITS = {"mosaic_gpu": 64, "mosaic_tpu": 128, "xla": 32}  # tokens of a chunk: up to a few more than two are drawn
WIDTHS = {"xla": [5, 6], "mosaic_gpu": [16, 48], "mosaic_tpu": [128]}  # of experts' matrices
# Always the same examples; one that fails is not made smaller, which takes minutes.
KEPT = settings(deadline=None, derandomize=True, phases=[Phase.generate])
TILE = 8  # tokens of the selective scan's chunks here
UNIT_HEADS = {"xla": [3, 8], "mosaic_gpu": [64], "mosaic_tpu": [3, 8]}  # of sLSTM


def down_from(n):
    """n, ..., 1."""
    return st.integers(0, n - 1).map(lambda less: n - less)


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Of the selective scan, whose tokens are interpreted one by one."""
    with pytest.MonkeyPatch.context() as patch:
        for kernels in ("mosaic_gpu", "mosaic_tpu") if compat.MOSAIC_GPU else ("mosaic_tpu",):
            patch.setattr(dispatch.form("selective_scan", kernels), "TILE", TILE)
        yield


class Draw:
    """Arrays of one example: shapes by hypothesis, numbers from its seed."""

    def __init__(self, data, kernels, dtype=None):
        self.one, self.kernels = data.draw, kernels
        self.rng = np.random.default_rng(self.one(st.integers(0, 2**16), "seed"))
        self.B, self.T = self.one(st.integers(1, 2), "B"), self.one(down_from(2 * UNITS[kernels] + 9), "T")
        self.G, self.H = self.one(st.sampled_from([(1, 2), (2, 2), (1, 1)]), "G, H")
        self.dk, self.dv = self.one(down_from(9), "dk"), self.one(down_from(8), "dv")
        self.dtype = dtype or self.one(st.sampled_from([F32, BF16]), "dtype")
        orders = ("open", "mild", "mixed", "closed", "none"), ("mixed", "closed", "none", "open", "mild")
        gates = [self.one(st.sampled_from(order), "gates") for order in orders][: self.H]
        self.gates = np.transpose([checks.GATES[name] for name in gates])  # lowest and highest, by head
        often = self.one(st.sampled_from([1e-3, 0.05, 0.5, 0.0]), "documents")
        reset = jnp.asarray(self.rng.random((self.B, self.T)) < often)
        self.reset = reset.at[:, self.T // 4].set(True) if often else None
        # the kernels' chunks are as long as they are
        chunk = self.one(st.sampled_from([32, 8, 2, 1]), "chunk") if kernels == "xla" else 0
        self.how = {"chunk": chunk} if chunk else {}

    def shorten(self, tokens):
        """Where they are interpreted one by one."""
        self.T = min(self.T, tokens)
        self.reset = None if self.reset is None else self.reset[:, :tokens]

    def normal(self, *shape, dtype=F32, scale=1.0, mean=0.0):
        return jnp.asarray(self.rng.normal(mean, scale, size=shape), dtype)

    def keys(self, heads, **more):
        return self.normal(self.B, self.T, heads, self.dk, dtype=self.dtype, scale=self.dk**-0.5, **more)

    def values(self):
        return self.normal(self.B, self.T, self.H, self.dv, dtype=self.dtype)

    def decays(self, *more):
        """By head, then along the axes `more`."""
        drawn = self.rng.uniform(*self.gates, size=(*more, self.B, self.T, self.H))
        return jnp.moveaxis(jnp.float32(drawn), range(len(more)), range(-len(more), 0))

    def state(self):
        return self.normal(self.B, self.H, self.dk, self.dv)

    def uniform(self, low, high, *shape):
        return jnp.float32(self.rng.uniform(low, high, size=shape))


# Each: (operation of (*arrays, kernels=), arrays).


def of_gated_recurrence(d):
    q, k, v, g, state = d.keys(d.G), d.keys(d.G), d.values(), d.decays(), d.state()
    weight = [jnp.exp(d.uniform(-9, 1, *g.shape))] if d.one(st.sampled_from([True, False]), "weight") else []

    def run(q, k, v, g, state, weight=None, *, kernels):
        return gated_recurrence(q, k, v, g, state, d.reset, weight, kernels=kernels, **d.how)

    return run, (q, k, v, g, state, *weight)


def of_gla(d):
    def run(q, k, v, g, state, *, kernels):
        return gla(q, k, v, g, state, d.reset, kernels=kernels, **d.how)

    return run, (d.keys(d.H), d.keys(d.H), d.values(), d.decays(d.dk), d.state())


def of_delta_rule(d):
    k = d.normal(d.B, d.T, d.G, d.dk)
    if d.one(st.booleans(), "one key"):
        k = jnp.broadcast_to(k[:, :1], k.shape)
    k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(d.dtype)
    beta = d.uniform(0, d.one(st.sampled_from([2.0, 1.0]), "highest beta"), d.B, d.T, d.H)
    decays = [d.decays()] if d.one(st.sampled_from([True, False]), "decays") else []

    def run(q, k, v, beta, state, g=None, *, kernels):
        return delta_rule(q, k, v, beta, g, state, d.reset, kernels=kernels, **d.how)

    return run, (d.keys(d.G), k, d.values(), beta, d.state(), *decays)


def of_mlstm(d):
    """Queries and keys have a mean, so that the normaliser stays away from 0, where products of rounded numbers would
    be lost, and some channels: with one, h does not depend on q. Of rounded numbers it stays above its floor too: a
    token as near to that as rounding is on either side of it, and its dq another."""
    d.dk += 3
    low, high = (-9, 3) if d.dtype == F32 else (2, 4)
    ends = d.one(st.sampled_from([(4, 9), (-4, 6)]), "forget gates")
    i, f = d.uniform(low, high, d.B, d.T, d.H), d.uniform(*ends, d.B, d.T, d.H)
    q, k = (d.keys(d.H, mean=1.0) for _ in range(2))

    def run(q, k, v, i, f, C, n, *, kernels):
        h, after = mlstm.mlstm(q, k, v, i, f, mlstm.State(C, n, m), d.reset, kernels=kernels, **d.how)
        return h, after.C, after.n

    m = d.normal(d.B, d.H)
    return run, (q, k, d.values(), i, f, d.state(), d.normal(d.B, d.H, d.dk, mean=2.0))


def of_selective_scan(d):
    d.shorten(2 * TILE + 5)
    E, N = d.dk, d.one(st.sampled_from([5, 1, 16]), "N")
    low, high = d.one(st.sampled_from([(1e-3, 1.0), (5.0, 60.0), (0.0, 1e-6)]), "steps")
    u, B, C = (d.normal(d.B, d.T, n, dtype=d.dtype) for n in (E, N, N))

    def run(u, dt, A, B, C, state, *, kernels):
        return selective_scan(u, dt, A, B, C, state, d.reset, kernels=kernels, **d.how)

    return run, (u, d.uniform(low, high, d.B, d.T, E), -d.uniform(0.3, 3, E, N), B, C, d.normal(d.B, E, N))


def of_short_conv(d):
    K, E = d.one(down_from(7), "K") + 1, d.dk
    before = jnp.zeros((d.B, K - 1), jnp.int32)
    seen = None
    if d.reset is not None:
        documents = jnp.concatenate([before, jnp.cumsum(d.reset, axis=1)], axis=1)
        seen = jnp.stack([documents[:, j : j + d.T] == documents[:, K - 1 :] for j in range(K - 1)], axis=1)

    def run(x, past, taps, bias, *, kernels):
        return (short_conv(x, past, taps, bias, seen, kernels=kernels),)

    x, past = (d.normal(d.B, n, E, dtype=d.dtype) for n in (d.T, K - 1))
    return run, (x, past, d.normal(K, E), d.normal(E))


def of_gated_norm(d):
    groups, heads = d.one(st.sampled_from([2, 1, 3]), "groups"), d.one(down_from(3), "heads of each")
    E = groups * heads * (128 if d.kernels == "mosaic_gpu" else d.dv)
    d.shorten(24)

    def run(y, u, z, skip, gain, *, kernels):
        return (gated_norm(y, u, z, skip, gain, groups=groups, eps=1e-5, kernels=kernels),)

    wide = [d.normal(d.B, d.T, E, dtype=d.dtype, scale=scale) for scale in (1.0, 1.0, 3.0)]
    return run, (*wide, d.normal(groups * heads), d.normal(E))


def of_slstm(d):
    """R as the kernel for GPUs rounds it. m is a constant to the backward pass."""
    d.shorten(40 if d.kernels == "xla" else 9)
    n = d.one(st.sampled_from(UNIT_HEADS[d.kernels]), "d")
    R = d.normal(4, d.H, n, n, scale=n**-0.5).astype(BF16).astype(F32)
    h, c, m = (d.normal(d.B, d.H, n) for _ in range(3))

    def run(gates, R, h, c, n, *, kernels):
        out, after = slstm.slstm(gates, R, slstm.State(h, c, n, m), d.reset, kernels=kernels)
        return out, after.c, after.n

    return run, (d.normal(d.B, d.T, d.H, 4, n), R, h, c, jnp.abs(c) + 1)


def of_ragged_matmul(d):
    """Empty groups, and rows that belong to none."""
    groups = d.one(down_from(5), "groups")
    sizes = jnp.asarray(d.rng.integers(0, 41, size=groups) * (d.rng.random(groups) < 0.6), jnp.int32)
    rows = max(1, int(sizes.sum()) + d.one(down_from(10), "rest") - 1)
    D, F = (d.one(st.sampled_from(WIDTHS[d.kernels][::step]), name) for name, step in (("D", 1), ("F", -1)))

    def run(x, w, *, kernels):
        return (ragged_matmul(x, w, sizes, kernels=kernels),)

    return run, (d.normal(rows, D, dtype=d.dtype), d.normal(groups, D, F, dtype=d.dtype, scale=D**-0.5))


OPS = {
    f.__name__.removeprefix("of_"): f
    for f in (
        of_gated_recurrence,
        of_gla,
        of_delta_rule,
        of_mlstm,
        of_selective_scan,
        of_short_conv,
        of_gated_norm,
        of_slstm,
        of_ragged_matmul,
    )
}


def equals_the_definition(op, kernels, data, dtype=None):
    draw = Draw(data, kernels, dtype)
    run, arrays = OPS[op](draw)
    like = jax.eval_shape(partial(run, kernels="reference"), *arrays)
    cotangents = tuple(draw.normal(*a.shape, dtype=a.dtype) for a in like)
    with dispatch.interpreted():
        got = checks.values_and_gradients(partial(run, kernels=kernels), arrays, cotangents, kernels)
    exact = jax.tree.map(lambda a: a.astype(F32), (arrays, cotangents))
    want = checks.values_and_gradients(partial(run, kernels="reference"), *exact, "reference")
    rounded = any(a.dtype == BF16 for a in arrays)
    # Where one key outweighs the others, as at a document's beginning, mLSTM's h hardly depends on q: dq is what two
    # terms as large as h's gradient leave of each other.
    least = 0.25 * float(jnp.linalg.norm(cotangents[0].astype(F32))) if op == "mlstm" and rounded else 1e-2
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # A state of the delta rule is what tokens' values, of order one and rounded, leave of each other.
        erased = op == "delta_rule" and rounded and i == 1
        size = max(float(jnp.linalg.norm(b)), 0.25 * b.size**0.5 if erased else least)
        assert checks.distance(a, b) <= (4e-2 if rounded else 3e-4) * size, (i, checks.distance(a, b) / size)


@pytest.mark.parametrize("op", OPS)
@settings(KEPT, max_examples=4)
@given(data=st.data())
def test_the_plain_form(op, data):
    equals_the_definition(op, "xla", data)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op not in ("short_conv", "gated_norm")])  # no form for them
@pytest.mark.parametrize("dtype", [F32, BF16])
@settings(KEPT, max_examples=1)
@given(data=st.data())
def test_on_tpus(op, dtype, data):
    """One example, as below."""
    equals_the_definition(op, "mosaic_tpu", data, dtype)


@pytest.mark.skipif(not compat.MOSAIC_GPU, reason=f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}")
@pytest.mark.parametrize("op", OPS)
@settings(KEPT, max_examples=1)
@given(data=st.data())
def test_on_gpus(op, data):
    """One example, since the interpreter takes seconds for each."""
    equals_the_definition(op, "mosaic_gpu", data, BF16)
