"""Small models of every family: what `test_family.py` holds each of them to. A new mixer adds its own here."""

from scalelab.config import base, override

V = 23


def section(**changes):
    """A small model section in float32; dots in field names written as __."""
    small = {
        "vocab_size": V,
        "width": 16,
        "layers": 2,
        "compute_dtype": "float32",
        "init": "fan_in",
        "attention__heads": 4,
        "attention__kv_heads": 2,
        "attention__head_dim": 4,
        "mlp__hidden": 24,
        "loss_chunk": 64,
    }
    small |= changes
    return override(base(), {f"model.{name.replace('__', '.')}": value for name, value in small.items()}).model


MAMBA2 = {"mamba2__head_dim": 4, "mamba2__state": 5, "mamba2__groups": 2, "mamba2__chunk": 4}
GATED = {
    "gated_deltanet__heads": 2, "gated_deltanet__value_heads": 4, "gated_deltanet__key_dim": 3,
    "gated_deltanet__value_dim": 5, "gated_deltanet__chunk": 4,
}  # fmt: skip
SLSTM = ("slstm", "mlp")
MOE = {"blocks": (("attention", "moe"),), "moe__experts": 5, "moe__top_k": 2, "moe__hidden": 12}
LING = {"moe__router": "sigmoid", "moe__bias_rate": 0.001, "moe__scale": 2.5, "moe__shared": 1, "moe__experts": 6}
MOR = {
    "prefix": (("attention", "mlp", {"window": 3}),), "blocks": (("attention", "mlp"),),
    "suffix": (("mamba2", "none"),), "layers": 4, "recursion__count": 2, "recursion__capacities": (1.0, 0.5),
    "recursion__alpha": 2.0, **MAMBA2,
}  # fmt: skip


def smooth(**changes):
    """A norm of a head whose output is tiny bends so much that finite differences would need float64."""
    return section(norm_eps=0.01, **changes)


LINEAR = {
    "gla": smooth(blocks=(("gla", "mlp"),), gla__heads=2, gla__chunk=4),
    "gla_conv": smooth(blocks=(("gla", "mlp"),), gla__heads=2, gla__chunk=8, gla__conv=3),
    "deltanet": smooth(blocks=(("deltanet", "mlp"),), deltanet__heads=2, deltanet__chunk=4),
    "gated_deltanet": smooth(blocks=(("gated_deltanet", "mlp"),), **GATED),
    "lightning": smooth(
        blocks=(("lightning", "mlp"),), layers=3, lightning__heads=3, lightning__head_dim=4, lightning__chunk=4
    ),
    "delta_hybrid": smooth(  # negative eigenvalues; attention without positions
        blocks=(("gated_deltanet", "mlp"), ("deltanet", "none"), ("attention", "mlp")),
        layers=3,
        attention__rope_theta=0.0,
        deltanet__heads=2,
        deltanet__chunk=4,
        deltanet__negative=True,
        **{**GATED, "gated_deltanet__negative": True},
    ),
    "lightning_hybrid": smooth(
        blocks=(("lightning", "mlp"), ("attention", "mlp", {"window": 4}), ("gla", "none")),
        layers=6,
        lightning__heads=2,
        lightning__head_dim=8,
        gla__heads=2,
        gla__chunk=4,
    ),
}
FAMILY = {
    "parscale": section(
        blocks=(("attention", "mlp", {"window": 3}), ("mamba2", "none")),
        parscale__streams=3,
        parscale__prefix=2,
        **MAMBA2,
    ),
    "mor": section(**MOR),
    "mor_parscale": section(**MOR, parscale__streams=2, parscale__prefix=2),
    "mor_moe": section(
        **MOR
        | MOE
        | LING
        | {
            "blocks": (("attention", "mlp"), ("attention", "moe")),
            "layers": 6,
            "recursion__count": 3,
            "recursion__capacities": (0.7, 0.7, 0.4),
        },
    ),
    "moe": section(**MOE),
    "moe_ling": section(**MOE | LING, prefix=(("attention", "mlp"),), layers=3, moe__groups=3, moe__top_groups=2),
    "moe_capacity": section(**MOE, moe__capacity=1.0, moe__lbl_scope="sequence", moe__normalise=False),
    "moe_parscale": section(**MOE, parscale__streams=2, parscale__prefix=2, moe__lbl_scope="sequence"),
    "xlstm": section(blocks=(("mlstm", "mlp"),), mlstm__heads=2, mlstm__chunk=4, tied_embeddings=False, logit_cap=30.0),
    "xlstm_paper": section(
        blocks=(("mlstm_up", "none"), SLSTM),
        layers=4,
        norm="layernorm_gain",
        mlp__kind="geglu",
        mlstm_up__heads=2,
        mlstm_up__chunk=4,
        slstm__heads=2,
    ),
    **LINEAR,
    "mamba": section(blocks=(("mamba", "none"),), mamba__state=3, mamba__chunk=4, mamba__dt_rank=2),
    "mamba2": section(blocks=(("mamba2", "none"),), layers=3, **MAMBA2),
    "hybrid": section(
        blocks=(("mamba2", "none"), ("attention", "mlp", {"window": 4})), layers=4, placement="peri", **MAMBA2
    ),
}
# Choices between experts jump along any line: their gradients are tested where choices are fixed (test_moe.py).
PIECEWISE = {name for name in FAMILY if "moe" in name}
