"""Eight devices with their own rows each do what one does with all of them, values and gradients."""

import subprocess
import sys

import pytest

from tests.helpers import with_devices

CHECK = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from pallas_kernels.devices import per_device
from pallas_kernels.selective_scan import xla
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
u, dt = (jnp.float32(rng.normal(size=(16, 5, 4))) for _ in range(2))
A, B, C = (jnp.float32(rng.normal(size=shape)) for shape in ((4, 3), (16, 5, 3), (16, 5, 3)))
args = (u, jax.nn.softplus(dt), -jnp.exp(A), B, C)
run = lambda u, dt, A, B, C: xla.selective_scan(u, dt, A, B, C, None, None, 2)
def both(run):
    def loss(*args):
        y, h = run(*args)
        return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
placed = [jax.device_put(a, whole if i == 2 else rows) for i, a in enumerate(args)]
got = both(per_device(run, mesh, shared=(2,)))(*placed)
want = both(per_device(run, None))(*args)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
assert got[1][0].sharding.is_equivalent_to(rows, 3)
print("same")
"""


def test_rows_on_eight_devices():
    command = [sys.executable, "-c", CHECK]
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
    for way in ({}, {"mesh": mesh, "shards": 8}):
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
