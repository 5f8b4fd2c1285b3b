import pytest

from scalelab import models
from scalelab.config import base, override
from scalelab.errors import BadInput

A = ("attention", "mlp")
BAD = [
    ({"vocab_size": 0}, "config.model.vocab_size", "at least 1"),
    ({"width": 0}, "config.model.width", "at least 1"),
    ({"layers": 5, "blocks": (A, A)}, "config.model.layers", "plus a multiple of 2"),
    ({"layers": 2, "prefix": (A,), "suffix": (A,)}, "config.model.layers", "such as 3"),
    ({"blocks": ()}, "config.model.blocks", "at least one"),
    ({"blocks": (("attntion", "mlp"),)}, "config.model.blocks[0]: mixer", "attention"),
    ({"blocks": (("attention", "mpl"),)}, "config.model.blocks[0]: channel mixer", "mlp, moe, none"),
    ({"blocks": ("attention",)}, "config.model.blocks[0]", "must be (mixer, channel mixer"),
    ({"blocks": (("attention", "mlp", 3),)}, "config.model.blocks[0]", "must be (mixer, channel mixer"),
    ({"blocks": (A, ("attention", "mlp", {"windw": 3}))}, "config.model.blocks[1].windw", "known: bias"),
    ({"blocks": (("attention", "mlp", {"window": 3.5}),)}, "config.model.blocks[0].window", "type int"),
    ({"blocks": (("attention", "mlp", {"qk_norm": 1}),)}, "config.model.blocks[0].qk_norm", "type bool"),
    ({"blocks": (("attention", "mlp", {"window": -1}),)}, "config.model.blocks[0].window", "at least 0"),
    ({"attention.heads": 4, "attention.kv_heads": 3}, "config.model.attention.kv_heads", "divide heads = 4"),
    ({"attention.head_dim": 7}, "config.model.attention.head_dim", "even"),
    ({"attention.heads": 0}, "config.model.attention.heads", "at least 1"),
    ({"attention.soft_cap": -1.0}, "config.model.attention.soft_cap", "at least 0"),
    ({"moe.router": "nonsense"}, "config.model.moe.router", "softmax, sigmoid"),  # what no block uses, too
    ({"mamba.state": -4}, "config.model.mamba.state", "at least 1"),
    ({"gla.chunk": 24}, "config.model.gla.chunk", "power of two"),
    ({"mlp.kind": "relu"}, "config.model.mlp.kind", "swiglu, gelu"),
    ({"mlp.hidden": 0}, "config.model.mlp.hidden", "at least 1"),
    ({"norm": "batchnorm"}, "config.model.norm", "rmsnorm, layernorm"),
    ({"norm_eps": 0.0}, "config.model.norm_eps", "above 0"),
    ({"placement": "sandwich"}, "config.model.placement", "pre, post, peri, out"),
    ({"init": "xavier"}, "config.model.init", "normal, small, fan_in"),
    ({"compute_dtype": "float16"}, "config.model.compute_dtype", "bfloat16, float32"),
    ({"remat": "some"}, "config.model.remat", "none, dots, full"),
    ({"loss_chunk": 0}, "config.model.loss_chunk", "at least 1"),
    ({"logit_cap": -1.0}, "config.model.logit_cap", "at least 0"),
]


@pytest.mark.parametrize(("changes", "field", "remedy"), BAD, ids=[next(iter(case[0])) for case in BAD])
def test_bad_input_names_field_value_and_remedy(changes, field, remedy):
    config = override(base(), {f"model.{name}": value for name, value in ({"vocab_size": 9} | changes).items()}).model
    with pytest.raises(BadInput) as caught:
        models.validate(config)
    assert caught.value.field == field
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_what_is_fine():
    for changes in ({}, {"attention.head_dim": 7, "attention.rope_theta": 0.0}, {"width": 100}, {"slstm.heads": 3}):
        changes = {"vocab_size": 9} | changes
        models.validate(override(base(), {f"model.{name}": value for name, value in changes.items()}).model)
