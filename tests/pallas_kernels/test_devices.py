"""Eight devices with their own rows each do what one does with all of them, values and gradients."""

import subprocess
import sys

import pytest

from tests.helpers import with_devices

OPERATIONS = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from pallas_kernels import delta_rule, dispatch, gated_recurrence, gla, mlstm, selective_scan, slstm
import pallas_kernels.selective_scan.tpu
from pallas_kernels.devices import per_device
from scalelab.models.moe import experts
from tests.pallas_kernels.delta_rule import kernel_checks as of_delta_rule
from tests.pallas_kernels.gated_norm import kernel_checks as of_gated_norm
from tests.pallas_kernels.gated_recurrence import kernel_checks as of_gated_recurrence
from tests.pallas_kernels.gla import kernel_checks as of_gla
from tests.pallas_kernels.mlstm import kernel_checks as of_mlstm
from tests.pallas_kernels.selective_scan import kernel_checks as of_selective_scan
from tests.pallas_kernels.short_conv import kernel_checks as of_short_conv
from tests.pallas_kernels.slstm import kernel_checks as of_slstm
selective_scan.tpu.TILE = 8  # tokens that are interpreted one by one
small = dict(T=5, B=8, dk=16, dv=16, dtype=jnp.float32)
arrays, state, (d_h, d_C, d_n), reset = of_mlstm.inputs(**small)
cell = (*arrays, state), (d_h, mlstm.State(d_C, d_n, jnp.zeros_like(state.m))), reset
scan, plain = of_selective_scan.inputs(8, 5, 4, 3), of_short_conv.inputs(8, 5, 6, 4)
draw = iter(np.random.default_rng(0).normal(size=(7, 2 * 128 * 128)).astype(np.float32))
def numbers(*shape):
    return jnp.asarray(next(draw)[: np.prod(shape)].reshape(shape)) / 8
mixture = numbers(8, 3, 128), numbers(8, 3, 2), numbers(2, 128, 128), numbers(2, 128, 128), numbers(2, 128, 128)
chosen = jnp.asarray(np.random.default_rng(1).integers(0, 3, (8, 3, 2)), jnp.int32)  # 2 experts and none
def of_experts(x, w, gate, up, down, chosen, *, kernels):
    return experts(x, chosen, w, gate, up, down, kernels=kernels)
cases = [  # an operation of (*arrays, documents), what is not cut, form, (arrays, cotangents, documents)
    (delta_rule.delta_rule, (), "mosaic_tpu", of_delta_rule.inputs(**small)),
    (gated_recurrence.gated_recurrence, (), "mosaic_tpu", of_gated_recurrence.inputs(**small)),
    (gla.gla, (), "mosaic_tpu", of_gla.inputs(**small)),
    (mlstm.mlstm, (), "mosaic_tpu", cell),
    (selective_scan.selective_scan, (2,), "mosaic_tpu", scan),
    (partial(selective_scan.selective_scan, chunk=2), (2,), "xla", scan),
    (slstm.slstm, (1,), "mosaic_tpu", of_slstm.inputs(8, 3, 1, 8)),
    (of_short_conv.several, (2, 3), "xla", plain),
    (of_gated_norm.whole, (3, 4), "xla", (*of_gated_norm.inputs(8, 5, 6, 2), None)),
    *((of_experts, (2, 3, 4), form, (mixture, numbers(8, 3, 128), chosen)) for form in ("mosaic_tpu", "xla")),
]
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))
def both(run):
    def values_and_gradients(arrays, cotangents, documents):
        out, pull = jax.vjp(lambda *arrays: run(*arrays, documents), *arrays)
        return out, pull(cotangents)
    return jax.jit(values_and_gradients)
for op, shared, kernels, (arrays, cotangents, documents) in cases:
    places = [whole if i in shared else rows for i in range(len(arrays))]
    placed = [jax.device_put(a, place) for a, place in zip(arrays, places)]
    with dispatch.interpreted():
        got = both(per_device(partial(op, kernels=kernels), mesh, shared))(
            placed, *jax.device_put((cotangents, documents), rows)
        )
    want = both(partial(op, kernels="reference"))(arrays, cotangents, documents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{op} {kernels}")
    out, gradients = got
    for place, tree in zip((rows, *places), (out, *gradients), strict=True):
        assert all(a.sharding.is_equivalent_to(place, a.ndim) for a in jax.tree.leaves(tree))
print("same")
"""


def test_rows_on_eight_devices():
    command = [sys.executable, "-c", OPERATIONS]
    done = subprocess.run(command, env=with_devices(8), capture_output=True, text=True, timeout=120)
    assert "same" in done.stdout, done.stderr


MODEL = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from scalelab import models, recipe
from scalelab.config import base, override
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
tokens = np.random.default_rng(0).integers(1, 30, size=(8, 12)).astype(np.int32)
segments = np.cumsum(np.random.default_rng(1).random((8, 12)) < 0.2, axis=1).astype(np.int32)
shapes = {family: recipe.shape(family, 16) for family in recipe.FAMILIES if family != "moe"}  # whose choices jump
shapes["slstm"] = shapes["xlstm"] | {"model.blocks": (("slstm", "mlp"),)}
shapes["mlstm_up"] = shapes["xlstm"] | {"model.blocks": (("mlstm_up", "none"),)}
shapes["parscale"] = shapes["hybrid"] | {"model.parscale.streams": 2}
# norms of heads whose outputs are tiny bend so much that rounding would show
fixed = {"model.vocab_size": 32, "model.compute_dtype": "float32", "model.norm_eps": 0.01}
for name, shape in shapes.items():
    config = override(base(), {**shape, **fixed}).model
    params = models.init(config, jax.random.key(0))
    found = {}
    for way in ({}, {"mesh": mesh}):
        graphdef, _ = models.abstract(config, **way)
        def loss(params, tokens, segments):
            return jnp.sum(models.merge(graphdef, params).nll(tokens, tokens, segments)[0])
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        # cut up by the compiler: a mixer of each kind shows it
        for shared in (True,) if way else (True, False) if name in ("transformer", "mamba2", "parscale") else (False,):
            text = jax.device_put((tokens, segments), rows) if shared else (tokens, segments)
            found[bool(way), shared] = jax.jit(jax.grad(loss))(params, *text)
    alone = found.pop((False, False))
    assert found
    for a, b in ((a, b) for got in found.values() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
print("same")
"""


@pytest.mark.slow
def test_eight_devices_have_the_gradients_of_one_told_of_their_mesh_or_not():
    command = [sys.executable, "-c", MODEL]
    done = subprocess.run(command, env=with_devices(8), capture_output=True, text=True, timeout=300)
    assert "same" in done.stdout, done.stderr
