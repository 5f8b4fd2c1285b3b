"""muP and CompleteP: every tensor of every family by its rule, and nothing but the standard model at the base."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import FAMILY, MAMBA2, section

from scalelab import models
from scalelab.config import override
from scalelab.errors import BadInput
from scalelab.models.registry import CHANNELS, MIXERS, resolve
from scalelab.parametrization import Rule, Tensor, rule

pytestmark = pytest.mark.once
each = pytest.mark.parametrize("name", FAMILY)

# By hand, from the tables of the reference: what every tensor is. `fixed` matrices keep their fan-in as a model widens.
NORM = {"scale": "vector", "bias": "vector"}
QKV = {"qkv": "hidden", "conv": "vector", "out": "hidden", "norm": "vector"}
CLASSES = {
    "outer": {"embed": "embedding", "unembed": "embedding", "positions": "embedding"},
    "embed_norm": NORM,
    "final_norm": NORM,
    "aggregator": {"inward": "hidden", "inward_bias": "vector", "out": "hidden", "out_bias": "vector"},
    "recursion": {"router": "hidden"},
    "norms": NORM,
    "stream": {"vector": "vector"},
    "attention": dict.fromkeys("qkv", "hidden") | {"out": "hidden"} | dict.fromkeys(
        ("q_bias", "k_bias", "v_bias", "out_bias", "q_norm", "k_norm", "prefix_k", "prefix_v"), "vector"
    ),
    "mlp": dict.fromkeys(("gate", "up", "down"), "hidden")
    | dict.fromkeys(("gate_bias", "up_bias", "down_bias"), "vector"),
    "moe": dict.fromkeys(
        ("router", "gate", "up", "down", "shared_gate", "shared_up", "shared_down"), "hidden") | {"bias": "buffer"},
    "mamba": dict.fromkeys(("inward", "x", "dt", "out"), "hidden")
    | dict.fromkeys(("conv", "conv_bias", "dt_bias", "A_log", "D"), "vector"),
    "mamba2": dict.fromkeys(("inward", "dt", "out"), "hidden")
    | dict.fromkeys(("conv", "conv_bias", "dt_bias", "A_log", "D", "norm"), "vector"),
    "mlstm": dict.fromkeys(("q", "k", "v", "o", "i", "f", "out"), "hidden")
    | dict.fromkeys(("i_bias", "f_bias", "norm"), "vector"),
    "mlstm_up": dict.fromkeys(("up", "i", "f", "down"), "hidden") | dict.fromkeys("qkv", "fixed")
    | dict.fromkeys(("conv", "conv_bias", "i_bias", "f_bias", "norm", "skip"), "vector"),
    "slstm": dict.fromkeys((*"ifzo", "recurrent"), "fixed")
    | dict.fromkeys(("conv", "conv_bias", "i_bias", "f_bias", "z_bias", "o_bias", "norm"), "vector"),
    "gla": QKV | {"decay_in": "hidden", "decay_out": "fixed", "decay_bias": "vector", "gate": "hidden"},
    "deltanet": QKV | {"beta": "hidden"},
    "gated_deltanet": QKV
    | dict.fromkeys(("beta", "dt", "gate"), "hidden") | dict.fromkeys(("dt_bias", "A_log"), "vector"),
    "lightning": {"qkv": "hidden", "out": "hidden", "norm": "vector", "slopes": "buffer", "gate": "hidden"},
}  # fmt: skip


def grown(name, times=2, deeper=1, kind="completep"):
    """The family's model, `times` as wide and `deeper` times as deep, with itself as the base."""
    small = FAMILY[name]
    changes = {"width": times * small.width, "layers": deeper * (small.layers - len(small.prefix)) + len(small.prefix)}
    for section_name, part in {**MIXERS, **CHANNELS}.items():
        changes |= {f"{section_name}.{field}": times * small[section_name][field] for field in part.grows}
    changes |= {"parametrization": kind, "mup.base_width": small.width, "mup.base_layers": small.layers}
    return override(small, changes)


def named(config, tree):
    """(place, tensor's name, value) of the leaves of a tree of parameters."""
    spec = resolve(config)
    for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Rule | Tensor)):
        keys = [key.key for key in path]
        if keys[0] not in models.lm.PARTS:
            yield ("outer" if len(keys) == 1 else keys[0]), keys[-1], keys[0], value
            continue
        block = {"prefix": spec.prefix, "period": spec.period, "suffix": spec.suffix}[keys[0]][int(keys[1])]
        places = {"mixer": block.mixer, "channel": block.channel, "mixer_norms": "norms", "channel_norms": "norms"}
        yield places.get(keys[2], keys[2]), keys[-1], keys[0], value


@each
def test_every_tensor_has_the_rule_of_its_class(name):
    config = grown(name, times=2, deeper=3)
    m_L = len(resolve(config).blocks) / len(resolve(FAMILY[name]).blocks)  # layers of a pass
    found = models.rules(config, decay_exponent=0.5)
    assert jax.tree.structure(found) == jax.tree.structure(models.abstract(config)[1])
    for place, tensor, part, mine in named(config, found):
        kind = CLASSES[place][tensor]
        eps = 0.5 / m_L if part in models.lm.PARTS else 0.5
        expected = {
            "hidden": Rule(0.5, math.sqrt(2), eps), "fixed": Rule(1.0, 1.0, eps), "vector": Rule(1.0, 1.0, eps),
            "embedding": Rule(1.0, 1.0, eps), "buffer": Rule(0.0, 0.0, 1.0),
        }[kind]  # fmt: skip
        assert mine == expected, (place, tensor)


def test_the_classes_are_those_of_all_mixers_and_of_all_their_options():
    everything = {"attention.bias": True, "attention.qk_norm": True, "mlp.bias": True, "norm": "layernorm",
                  "moe.shared": 1, "moe.bias_rate": 0.1, "gla.conv": 4, "parscale.streams": 2, "positions": 8,
                  "tied_embeddings": False, "embed_norm": True, "mamba2.head_dim": 4, "recursion.count": 2}  # fmt: skip
    blocks = tuple((mixer, channel) for mixer in MIXERS for channel in CHANNELS)
    config = override(section(), everything | {"prefix": blocks, "layers": len(blocks) + 1})
    seen: dict = {}
    for place, tensor, _, _ in named(config, models.roles(config)):
        seen.setdefault(place, set()).add(tensor)
    assert seen == {place: set(tensors) for place, tensors in CLASSES.items()}


def test_a_role_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule for the role 'bias'"):
        rule(Tensor((2,), "bias"), 2.0, 1.0, True, 1.0)


@each
def test_at_the_base_nothing_differs_from_standard(name):
    plain, scaled = FAMILY[name], grown(name, times=1)
    draw = lambda config: jax.jit(lambda key: models.init(config, key))(jax.random.key(3))  # noqa: E731
    params, same = draw(plain), draw(scaled)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    tokens = np.arange(20).reshape(2, 10) % 23
    out = [jax.jit(functools.partial(models.logits, config))(params, tokens) for config in (plain, scaled)]
    np.testing.assert_array_equal(*out)
    rules = jax.tree.leaves(models.rules(scaled), is_leaf=lambda leaf: isinstance(leaf, Rule))
    assert set(rules) <= {Rule(1.0, 1.0, 1.0), Rule(0.0, 0.0, 1.0)}


@pytest.mark.parametrize(
    ("name", "init"),
    [*((name, "fan_in") for name in FAMILY), *((n, i) for n in ("hybrid", "moe_ling") for i in ("normal", "small"))],
)
def test_matrices_start_with_the_bases_variance_over_m(name, init):
    wide, small = override(grown(name, times=8), {"init": init}), override(FAMILY[name], {"init": init})
    draw = lambda config: jax.jit(lambda key: models.init(config, key))(jax.random.key(3))  # noqa: E731
    for (place, tensor, _, a), (_, _, _, b) in zip(named(wide, draw(wide)), named(small, draw(small)), strict=True):
        kind = CLASSES[place][tensor]
        if kind not in ("vector", "buffer") and b.size > 150 and b.any():
            ratio = 1 / math.sqrt(8) if kind == "hidden" else 1.0
            assert float(a.std() / b.std()) == pytest.approx(ratio, rel=6 / math.sqrt(b.size)), (place, tensor)


def test_multipliers_are_those_of_a_standard_model_with_its_tensors_scaled():
    """CompleteP at three times the depth and twice the width, a head four times as wide: folded into the weights."""
    config = section(
        width=32, layers=6, attention__heads=2, attention__kv_heads=2, attention__head_dim=16, mlp__hidden=48,
        placement="peri", parametrization="completep", mup__base_width=16, mup__base_layers=2,
        mup__base=(("attention.head_dim", 4), ("attention.heads", 4), ("attention.kv_heads", 4)),
        mup__embed_multiplier=3.0, mup__logit_multiplier=5.0, tied_embeddings=False,
    )  # fmt: skip
    params = models.init(config, jax.random.key(0))
    plain = override(config, {"parametrization": "standard", "mup.base_width": 0, "mup.base_layers": 0, "mup.base": (),
                              "mup.embed_multiplier": 1.0, "mup.logit_multiplier": 1.0})  # fmt: skip
    folded = jax.tree.map(lambda a: a, params)
    folded["embed"] = 3.0 * params["embed"]
    folded["unembed"] = 5.0 / 2 * params["unembed"]
    block = folded["period"]["0"]
    block["mixer"]["q"] = block["mixer"]["q"] / 2  # sqrt(4) / 16 = 1 / sqrt(16) / 2
    for norms in ("mixer_norms", "channel_norms"):
        block[norms]["norm_out"]["scale"] = block[norms]["norm_out"]["scale"] / 3
    tokens = np.arange(20).reshape(2, 10) % 23
    expected = models.logits(plain, folded, tokens)
    np.testing.assert_allclose(models.logits(config, params, tokens), expected, rtol=1e-5, atol=1e-6)
    graphdef, _ = models.abstract(config)
    _, lse, _ = models.merge(graphdef, params).nll(tokens, tokens)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(expected, axis=-1), rtol=1e-5)
    state, steps = models.merge(graphdef, params).init_state(2, 10), []
    for t in range(10):
        logits, state = models.merge(graphdef, params).step(tokens[:, t], state)
        steps.append(logits)
    np.testing.assert_allclose(jnp.stack(steps, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "out"])
def test_branches_are_multiplied_where_they_are_added(placement):
    """With m_L = 3: what a block adds to its input is a third of what a standard one adds, before any norm on both."""
    config = section(placement=placement, layers=1, blocks=(("attention", "none"),), norm_eps=1e-9)
    third = override(config, {"parametrization": "completep", "mup.base_width": 16, "mup.base_layers": 3, "layers": 9})
    one = override(config, {"layers": 9})
    params = models.init(one, jax.random.key(0))
    tokens = np.arange(20).reshape(2, 10) % 23
    seen = [models.merge(models.abstract(c)[0], params).activations(jnp.asarray(tokens)) for c in (one, third)]
    embed = seen[0]["embedding"]
    np.testing.assert_array_equal(embed, seen[1]["embedding"])
    added, a_third = (s["blocks"][0] - embed for s in seen)
    if placement == "post":
        return np.testing.assert_raises(AssertionError, np.testing.assert_allclose, a_third, added, rtol=1e-3)
    return np.testing.assert_allclose(a_third, added / 3, rtol=1e-4, atol=1e-6)


def test_activations_are_those_of_the_pass_and_in_order():
    config = section(layers=6, blocks=(("mamba2", "none"), ("attention", "mlp")), prefix=(("attention", "none"),),
                     suffix=(("mamba2", "none"),), **MAMBA2)  # fmt: skip
    params = models.init(config, jax.random.key(0))
    tokens = jnp.arange(20).reshape(2, 10) % 23
    seen = models.merge(models.abstract(config)[0], params).activations(tokens)
    assert seen["blocks"].shape == (6, 2, 10, 16)
    # compiled apart, so to rounding
    np.testing.assert_allclose(seen["logits"], models.logits(config, params, tokens), rtol=1e-5, atol=1e-5)
    # Without the layers behind it, a layer's output is the last.
    shorter = override(config, {"layers": 3, "suffix": ()})
    every, params = params, params | {"period": jax.tree.map(lambda a: a[:1], params["period"]), "suffix": {}}
    with jax.disable_jit():  # operation by operation: no rounding between two programs
        whole = models.merge(models.abstract(config)[0], every).activations(tokens)["blocks"]
        first = models.merge(models.abstract(shorter)[0], params).activations(tokens)["blocks"]
    np.testing.assert_allclose(first, whole[:3], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(whole, seen["blocks"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parametrization": "mu"}, "must be one of standard, mup, completep"),
        ({"mup.base_width": 8}, "needs model.parametrization"),
        ({"parametrization": "mup"}, "base_width = 0: must be that of the model"),
        ({"parametrization": "mup", "mup.base_width": 8}, "base_layers = 0: must be that of the model"),
        ({"parametrization": "mup", "mup.base_width": 6, "mup.base_layers": 2}, "makes attention.heads = 1.5 in"),
        ({"mup.base": (("mlp.hiden", 3),)}, "no such option; known: bias, hidden, kind"),
        ({"mup.base": (("moe.hidden", 3),)}, "with a section that the blocks use, such as attention, mlp"),
        ({"mup.base": ("mlp.hidden", 3)}, "must be \\('section.field', value\\)"),
        ({"mup.base": (("mlp.hidden", "3"),)}, "must be of type int"),
        ({"mup.base": (("mlp.hidden", 0),)}, "must be at least 1"),
        ({"mup.logit_multiplier": 0.0}, "must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, says):
    given = (
        {"parametrization": "mup", "mup.base_width": 8, "mup.base_layers": 2} if "mup.base_width" not in changes else {}
    )
    if "parametrization" in changes or "mup.base_width" in changes:
        given = {}
    with pytest.raises(BadInput, match=says) as error:
        resolve(override(section(), given | changes))
    assert "\n" not in str(error.value)


def test_the_base_may_differ_in_more_than_width():
    """Two heads at any width, as xLSTM has them: heads of sLSTM widen, so its head-wise maps are scaled."""
    config = section(width=32, blocks=(("slstm", "none"),), slstm__heads=2, parametrization="mup", mup__base_width=16,
                     mup__base_layers=2, mup__base=(("slstm.heads", 2),))  # fmt: skip
    assert models.rules(config)["period"]["0"]["mixer"]["recurrent"] == Rule(0.5, 2.0, 0.5)
