import math

import jax
import jax.numpy as jnp
import pytest

from scalelab import models, parametrization
from scalelab.config import base, override


def section(**changes):
    changes = {"vocab_size": 512, "width": 128, "tied_embeddings": False, "attention.bias": True, **changes}
    return override(base(), {f"model.{name}": value for name, value in changes.items()}).model


def init(config):
    return jax.jit(lambda key: models.init(config, key))(jax.random.key(0))


# std of (embed, unembed, q, attention out, up, down) at D 128, F 704, H d 256, L 4
STDS = {
    "normal": (0.02,) * 3 + (0.02 / math.sqrt(8), 0.02, 0.02 / math.sqrt(8)),
    "small": (math.sqrt(2 / 640),) * 3 + (2 / (8 * math.sqrt(128)), math.sqrt(2 / 640), 2 / (8 * math.sqrt(128))),
    "fan_in": (128**-0.5,) * 3 + (256**-0.5, 128**-0.5, 704**-0.5),
}


@pytest.mark.parametrize("kind", parametrization.INITS)
def test_matrices_start_as_their_role_says(kind):
    params = init(section(init=kind))
    block = params["period"]["0"]
    tensors = params["embed"], params["unembed"], block["mixer"]["q"], block["mixer"]["out"]
    for tensor, std in zip((*tensors, block["channel"]["up"], block["channel"]["down"]), STDS[kind], strict=True):
        assert tensor.dtype == jnp.float32
        assert float(tensor.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(tensor.mean())) < 0.02 * std
    q = block["mixer"]["q"]
    assert abs(float(jnp.corrcoef(q[0].ravel(), q[1].ravel())[0, 1])) < 0.03  # layers are drawn apart


def test_gains_start_at_one_and_biases_at_zero():
    params = init(section(norm="layernorm", **{"attention.qk_norm": True}))
    mixer, norm = params["period"]["0"]["mixer"], params["period"]["0"]["mixer_norms"]["norm"]
    assert all((gain == 1).all() for gain in (norm["scale"], mixer["q_norm"], params["final_norm"]["scale"]))
    assert not any(bias.any() for bias in (norm["bias"], mixer["q_bias"], mixer["out_bias"]))


def test_residual_branches_are_counted():
    without_mlp = init(section(blocks=(("attention", "none"),)))
    assert float(without_mlp["period"]["0"]["mixer"]["out"].std()) == pytest.approx(0.02 / 2, rel=0.02)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_decay_mask(decay_embeddings):
    config = section(norm="layernorm", **{"attention.qk_norm": True, "mlp.bias": True})
    roles = models.roles(config)
    mask = parametrization.decay_mask(roles, decay_embeddings)
    assert jax.tree.structure(mask) == jax.tree.structure(models.abstract(config)[1])
    assert mask["embed"] is decay_embeddings
    assert mask["unembed"] is True
    decayed = {path[-1].key for path, on in jax.tree_util.tree_leaves_with_path(mask["period"]) if on}
    assert decayed == {"q", "k", "v", "out", "gate", "up", "down"}


def test_roles():
    roles = models.roles(section())
    assert (roles["embed"], roles["unembed"]) == ("embedding", "unembedding")
    assert set(jax.tree.leaves(roles)) <= set(parametrization.ROLES)
    assert "unembed" not in models.roles(section(tied_embeddings=True))
