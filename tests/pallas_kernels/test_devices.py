"""Eight devices with their own rows each do what one does with all of them, values and gradients."""

import subprocess
import sys

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
