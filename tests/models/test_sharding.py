"""The same loss and gradient on eight devices as on one, in a process of its own (the device count is fixed at
import)."""

import subprocess
import sys

from tests.helpers import with_devices

PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from scalelab import models
from scalelab.config import base, override

assert jax.device_count() == 8
small = {"model.vocab_size": 48, "model.width": 32, "model.layers": 2, "model.loss_chunk": 64,
    "model.compute_dtype": "float32", "model.attention.head_dim": 8, "model.mlp.hidden": 48}
shared = {"model.layers": 3, "model.prefix": (("attention", "mlp"),), "model.recursion.count": 2,
    "model.recursion.loss": 0.1}
mesh = Mesh(np.array(jax.devices()), ("data",))
rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
text = jax.random.randint(jax.random.key(1), (16, 32), 0, 48)
segments = jnp.cumsum(text == 0, axis=1)

for changes, training in (({}, False), (shared, False), (shared, True)):
    config = override(base(), {**small, **changes}).model
    graphdef, _ = models.abstract(config, training=training)
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))

    def loss(params, text, segments):
        nll, lse, aux = models.merge(graphdef, params).nll(text, jnp.roll(text, -1, axis=1), segments)
        return jnp.mean(nll) + 1e-4 * jnp.mean(lse**2) + aux["loss"]

    run = jax.jit(jax.value_and_grad(loss))
    want = run(params, text, segments)
    arguments = jax.device_put(params, everywhere), jax.device_put(text, rows), jax.device_put(segments, rows)
    got = run(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    program = run.lower(*arguments).compile().as_text()
    moves = re.findall(r"= \\S+ (all-gather|all-to-all|collective-permute)", program)
    assert not moves, moves
    print("equal", len(re.findall(r" all-reduce(?:-start)?\\(", program)))
"""


def test_eight_devices_equal_one_and_move_no_activations():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=with_devices(8), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 3
