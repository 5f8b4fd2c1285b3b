import importlib

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.delta_rule.xla import invert
from scalelab import flops, models
from scalelab.config import base, load, override
from scalelab.models.delta import inversion_flops
from scalelab.models.registry import resolve


def section(**changes):
    """The model section, float32, with dots in field names written as __."""
    changes = {"vocab_size": 61, "width": 24, "compute_dtype": "float32", **changes}
    return override(base(), {f"model.{name.replace('__', '.')}": value for name, value in changes.items()}).model


LLAMA_165M = {
    "vocab_size": 50304,
    "width": 768,
    "layers": 12,
    "tied_embeddings": False,
    "attention__heads": 6,
    "attention__kv_heads": 6,
    "attention__head_dim": 128,
    "mlp__hidden": 2048,
}
GPT2_SMALL = {
    "vocab_size": 50257,
    "positions": 1024,  # counted as embedding, no FLOPs
    "width": 768,
    "layers": 12,
    "norm": "layernorm",
    "attention__heads": 12,
    "attention__kv_heads": 12,
    "attention__head_dim": 64,
    "attention__rope_theta": 0.0,
    "attention__bias": True,
    "mlp__kind": "gelu",
    "mlp__hidden": 3072,
    "mlp__bias": True,
}


def test_llama_165m():
    config = section(**LLAMA_165M)
    counts, per_token = flops.counts(config), flops.per_token(config, 2048)
    assert (counts.total, counts.non_embedding) == (162_220_800, 84_953_856)
    assert counts.active == counts.total
    assert counts.embedding == counts.unembedding == 50304 * 768
    assert per_token.forward == 284_903_424
    assert per_token.training == 3 * 284_903_424
    assert per_token.forward - per_token.forward_without_unembedding == 2 * 768 * 50304
    assert flops.state_bytes(config, 2048) == 75_497_472  # 75.5 MB in bfloat16


def test_gpt2_small():
    config = section(**GPT2_SMALL)
    counts = flops.counts(config)
    assert (counts.total, counts.non_embedding) == (124_439_808, 85_056_000)
    assert counts.embedding == (50257 + 1024) * 768
    assert counts.unembedding == 0  # tied
    assert flops.per_token(config, 1024).forward == 265_956_864


QK_NORMS = [
    {"attention__qk_norm": norm, "attention__qk_norm_full": full}
    for norm, full in ((False, False), (True, False), (True, True))
]


@st.composite
def configs(draw):
    kv_heads = draw(st.integers(1, 3))
    window = st.sampled_from([0, 1, 5])
    block = st.sampled_from([("attention", "mlp"), ("attention", "none"), ("attention", "mlp", {"window": 3})])
    parts = {name: tuple(draw(st.lists(block, max_size=2))) for name in ("prefix", "suffix")}
    parts["blocks"] = tuple(draw(st.lists(block, min_size=1, max_size=2)))
    layers = len(parts["prefix"]) + len(parts["suffix"]) + len(parts["blocks"]) * draw(st.integers(1, 3))
    return section(
        **parts,
        layers=layers,
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        placement=draw(st.sampled_from(["pre", "post", "peri", "out"])),
        embed_norm=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        loss_chunk=draw(st.integers(1, 30)),
        attention__heads=kv_heads * draw(st.integers(1, 2)),
        attention__kv_heads=kv_heads,
        attention__head_dim=2 * draw(st.integers(1, 4)),
        **draw(st.sampled_from(QK_NORMS)),
        attention__bias=draw(st.booleans()),
        attention__qkv_bias=draw(st.booleans()),
        positions=draw(st.sampled_from([0, 9])),
        attention__window=draw(window),
        attention__soft_cap=draw(st.sampled_from([0.0, 20.0])),
        mlp__kind=draw(st.sampled_from(["swiglu", "gelu"])),
        mlp__hidden=draw(st.integers(1, 40)),
        mlp__bias=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_counts_are_the_sum_of_the_leaves_and_the_formula(config):
    _, params = models.abstract(config)
    counts = flops.counts(config)
    assert counts.total == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert counts.embedding == params["embed"].size + config.positions * config.width

    a, m, D = config.attention, config.mlp, config.width
    H, Hk, d, F = a.heads, a.kv_heads, a.head_dim, m.hidden
    norm = D * (2 if config.norm == "layernorm" else 1) * (2 if config.placement == "peri" else 1)
    qk_norm = (H + Hk) * d if a.qk_norm_full else a.qk_norm * 2 * d
    bias = (a.bias or a.qkv_bias) * (H + 2 * Hk) * d + a.bias * D
    attention = 2 * D * H * d + 2 * D * Hk * d + qk_norm + bias + norm
    mlp = (3 if m.kind == "swiglu" else 2) * D * F + m.bias * ((2 if m.kind == "swiglu" else 1) * F + D) + norm
    assert counts.unembedding == (0 if config.tied_embeddings else D * config.vocab_size)
    blocks = resolve(config).blocks
    one_norm = D * (2 if config.norm == "layernorm" else 1)
    outside = one_norm * ((config.placement != "post") + config.embed_norm)
    body = len(blocks) * attention + sum(block.channel == "mlp" for block in blocks) * mlp
    assert counts.non_embedding == body + outside


@settings(max_examples=8, deadline=None)
@given(configs(), st.integers(1, 9), st.integers(1, 3))
def test_matrix_products_equal_those_of_the_jaxpr(config, T, B):
    graphdef, params = models.abstract(config)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    want = B * T * flops.per_token(config, T).matmul_forward
    assert flops.jaxpr_matmul_flops(lambda p, t: models.logits(config, p, t), params, tokens) == want
    assert flops.jaxpr_matmul_flops(lambda p, t: models.merge(graphdef, p).nll(t, t)[0], params, tokens) == want

    # Backward: twice the forward, and the chunked loss computes its logits again.
    def loss(p, t):
        return models.merge(graphdef, p).nll(t, t)[0].sum()

    again = B * T * 2 * config.width * config.vocab_size
    assert flops.jaxpr_matmul_flops(jax.grad(loss), params, tokens) == 3 * want + again


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(1, 12))
def test_decoding_a_sequence_costs_its_forward_pass(config, T):
    total = sum(flops.decode_per_token(config, context) for context in range(1, T + 1))
    assert total == pytest.approx(T * flops.per_token(config, T).forward, rel=1e-12)


@pytest.mark.parametrize("window", [0, 3, 50])
def test_state_bytes_are_those_of_the_caches(window):
    config = section(blocks=(("attention", "mlp", {"window": window}), ("attention", "none")), prefix=())
    graphdef, params = models.abstract(config)
    state = jax.eval_shape(lambda p: models.merge(graphdef, p).init_state(1, 7), params)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    caches = [leaf for path, leaf in leaves if path[-1].key in ("k", "v")]
    assert flops.state_bytes(config, 7, dtype_bytes=4) == sum(4 * leaf.size for leaf in caches)


def test_window_counts_itself():
    one = flops.per_token(section(attention__window=1), 10).forward
    none = flops.per_token(section(), 10).forward
    assert none - one == 4 * 4 * (4 * 64) * (11 / 2 - 1)  # 4 layers x 4 H d (kbar - 1)


def test_conventions():
    config = section(**LLAMA_165M)
    got = flops.conventions(config, 2048, 1e9)
    assert got == {
        "flops": 3 * 284_903_424 * 1e9,
        "flops_6n": 6 * 162_220_800 * 1e9,
        "flops_6n_non_embedding": 6 * 84_953_856 * 1e9,
    }


def test_jaxpr_count_of_known_programs():
    a, b = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))
    product = 2 * 2 * 3 * 5 * 7
    count = flops.jaxpr_matmul_flops
    assert count(jnp.matmul, a, b) == product
    assert count(jax.jit(jax.checkpoint(jnp.matmul)), a, b) == product
    square = jnp.ones((4, 4))
    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ c, c @ x), x, None, length=6), square) == 6 * 2 * 2 * 4**3
    assert count(lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x), True, square) == 2 * 4**3
    with pytest.raises(NotImplementedError, match="while"):
        count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, x), square)


def xlstm(width, layers, heads, hidden):
    return section(
        vocab_size=50304, width=width, layers=layers, blocks=(("mlstm", "mlp"),), tied_embeddings=False,
        logit_cap=30.0, mlp__hidden=hidden, mlstm__heads=heads, mlstm__chunk=64,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "seq_len", "total", "body", "forward"),
    [
        ((768, 12, 4, 2112), 2048, 164_073_312, 86_806_368, 255_306_240),
        ((768, 12, 4, 2048), 2048, 162_303_840, 85_036_896, 251_767_296),
        ((4096, 32, 8, 10944), 8192, 6_865_424_896, 6_453_334_528, 13_466_271_744),
    ],
)
def test_xlstm(shape, seq_len, total, body, forward):
    config = xlstm(*shape)
    counts = flops.counts(config)
    assert (counts.total, counts.non_embedding) == (total, body)
    assert flops.per_token(config, seq_len).forward == forward


@pytest.mark.parametrize(
    ("streams", "published"), [(1, 535_813_376), (2, 538_195_842), (4, 540_577_412), (8, 545_340_552)]
)
def test_parscale(streams, published):
    config = section(
        vocab_size=1000, width=896, layers=36, attention__heads=16, attention__kv_heads=2, attention__head_dim=56,
        mlp__hidden=4864, parscale__streams=streams,
    )  # fmt: skip
    biases = 36 * (16 + 2 * 2) * 56  # of q, k and v, which the official model has
    assert flops.counts(config).non_embedding + biases == published


def test_paper_xlstm_by_hand():
    """Section 4.3 and 4.4 of the specification, norms included, F' given."""
    D, K, H, F = 64, 4, 4, 128
    E = 2 * D
    config = section(
        width=D,
        layers=2,
        blocks=(("mlstm_up", "none"), ("slstm", "mlp")),
        norm="layernorm_gain",
        mlp__kind="geglu",
        mlp__hidden=F,
    )
    mlstm = 2 * D * E + E * (K + 1) + 12 * E + 2 * (3 * E * H + H) + 2 * E + E * D + D
    slstm = 2 * D + D * (K + 1) + 8 * D * (D // H) + 4 * D + D + 3 * D * F
    assert flops.counts(config).non_embedding == mlstm + slstm + D


def test_the_first_papers_125m():
    """xLSTM[1:0]: 24 blocks of width 768, 4 heads, by section 4.3."""
    config = override(load("xlstm:mixer=mlstm_up,size=125m"), {"model.vocab_size": 256}).model
    D, K, H = 768, 4, 4
    E = 2 * D
    block = 2 * D * E + E * (K + 1) + 12 * E + 2 * (3 * E * H + H) + 2 * E + E * D + D
    assert flops.counts(config).non_embedding == 24 * block + D == 86_539_200


def test_mamba_130m():
    config = section(vocab_size=50280, width=768, layers=24, blocks=(("mamba", "none"),), norm_eps=1e-5)
    counts = flops.counts(config)
    assert (counts.total, counts.non_embedding) == (129_135_360, 90_520_320)
    for seq_len in (1, 100, 2048):
        assert flops.per_token(config, seq_len).forward == 261_107_712
    assert flops.decode_per_token(config, 7) == 261_107_712
    assert flops.state_bytes(config, 2048) == flops.state_bytes(config, 1) == 24 * (1536 * 16 * 4 + 1536 * 3 * 2)


def test_mamba2_130m():
    config = section(
        vocab_size=50288, width=768, layers=24, blocks=(("mamba2", "none"),), norm_eps=1e-5, mamba2__chunk=256
    )
    counts = flops.counts(config)
    assert (counts.total, counts.non_embedding) == (128_989_632, 90_368_448)
    assert flops.per_token(config, 2048).forward == 287_026_176
    assert flops.state_bytes(config, 2048) == pytest.approx(19.1e6, rel=0.002)


def linear_body(mixer, width, layers, hidden):
    """Non-embedding parameters of layers of a mixer with so many parameters, a SwiGLU MLP and two norms."""
    return layers * (mixer + 3 * width * hidden + 2 * width) + width


def test_gla_by_hand():
    """GLA 1.3B: D 2048, L 24, H 4; 4 D^2 and the low-rank gate. FLOPs of section 7.1."""
    D, L, H, F, T, V = 2048, 24, 4, 5632, 2048, 32000
    config = section(
        vocab_size=V, width=D, layers=L, blocks=(("gla", "mlp"),), tied_embeddings=False, mlp__hidden=F, gla__chunk=64
    )
    dk, dv = 256, 512
    mixer = 2 * D * D // 2 + 3 * D * D + 16 * D + 16 * D // 2 + D // 2 + dv
    assert flops.counts(config).non_embedding == linear_body(mixer, D, L, F)
    matrices = 2 * (4 * D * D + 16 * D + 16 * D // 2 + 3 * D * F)
    recurrence = H * (2 * (dk + dv) * 32.5 + 4 * dk * dv)
    assert flops.per_token(config, T).forward == L * (matrices + recurrence) + 2 * D * V
    assert flops.decode_per_token(config, 9) == L * (matrices + H * 5 * dk * dv) + 2 * D * V
    assert flops.state_bytes(config, 9) == L * H * dk * dv * 4


def test_deltanet_by_hand():
    """DeltaNet 340M of the flame repository: D 1024, L 24, H 8, F 2816."""
    D, L, H, F, K, T, V = 1024, 24, 8, 2816, 4, 2048, 32000
    config = section(
        vocab_size=V, width=D, layers=L, blocks=(("deltanet", "mlp"),), tied_embeddings=False, mlp__hidden=F,
        deltanet__heads=H, deltanet__chunk=64,
    )  # fmt: skip
    d = D // H
    mixer = 4 * D * D + D * H + 3 * K * D + d
    assert flops.counts(config).non_embedding == linear_body(mixer, D, L, F)
    matrices = 2 * (4 * D * D + D * H + 3 * K * D + 3 * D * F)
    rule = H * (65 * 5 * d + 6 * d * d + 64 * 64 / 3)
    assert flops.per_token(config, T).forward == pytest.approx(L * (matrices + rule) + 2 * D * V, rel=1e-12)
    assert flops.decode_per_token(config, 9) == L * (matrices + H * 6 * d * d) + 2 * D * V
    assert flops.state_bytes(config, 9) == L * (H * d * d * 4 + 3 * D * 3 * 2)


@pytest.mark.parametrize("Q", [1, 9, 16, 20, 32, 64])
def test_the_delta_rule_inverts_at_its_stated_cost(Q):
    system = jax.ShapeDtypeStruct((3, Q, Q), jnp.float32)
    assert flops.jaxpr_matmul_flops(invert, system) == 3 * inversion_flops(Q)


def test_gated_deltanet_by_hand():
    """Qwen3-Next's linear layer: D 2048, 16 key heads and 32 value heads of 128: 33,718,464 parameters. And the paper's
    6 heads of 256 and 512: about 6 D^2."""
    D, K, T = 2048, 4, 2048
    layer = {"vocab_size": 1000, "width": D, "layers": 1, "blocks": (("gated_deltanet", "none"),)}
    config = section(
        **layer, gated_deltanet__heads=16, gated_deltanet__value_heads=32, gated_deltanet__key_dim=128,
        gated_deltanet__value_dim=128, gated_deltanet__chunk=64,
    )  # fmt: skip
    projections = D * (2 * 2048 + 2 * 4096) + D * 64 + 4096 * D
    mixer = projections + K * 8192 + 2 * 32 + 128
    assert mixer == 33_718_464
    assert flops.counts(config).non_embedding == mixer + 2 * D
    rule = 32 * (65 * 5 * 128 + 6 * 128 * 128 + 64 * 64 / 3)
    forward = flops.per_token(config, T).forward_without_unembedding
    assert forward == pytest.approx(2 * projections + 2 * K * 8192 + rule, rel=1e-12)
    assert flops.state_bytes(config, 9) == 32 * 128 * 128 * 4 + 3 * 8192 * 2
    paper = section(
        **layer, gated_deltanet__heads=6, gated_deltanet__value_heads=6, gated_deltanet__key_dim=256,
        gated_deltanet__value_dim=512,
    )  # fmt: skip
    assert flops.counts(paper).non_embedding / (6 * D * D) == pytest.approx(1, abs=0.005)


def test_lightning_by_hand():
    """MiniMax's layer at small size: 5 D^2 and the norm's gain; the slopes are no parameters."""
    D, H, d, Q, T = 64, 4, 16, 64, 256
    config = section(
        width=D,
        layers=3,
        blocks=(("lightning", "none"),),
        lightning__heads=H,
        lightning__head_dim=d,
        lightning__chunk=Q,
    )
    assert flops.counts(config).non_embedding == 3 * (5 * D * D + D + D) + D
    recurrence = H * (4 * d * 32.5 + 4 * d * d + 2 * d * d / Q)
    assert flops.per_token(config, T).forward_without_unembedding == 3 * (2 * 5 * D * D + recurrence)


def test_hybrids_add_up_layer_by_layer():
    def cost(**changes):
        config = section(layers=4, gated_deltanet__chunk=16, **changes)
        n = flops.counts(config)
        return (
            n.total - n.embedding - 24, flops.per_token(config, 50).forward_without_unembedding,
            flops.state_bytes(config, 50),
        )  # fmt: skip

    linear, attention = ("gated_deltanet", "mlp"), ("attention", "mlp")
    mixed = cost(blocks=(linear, linear, linear, attention))
    pure = [cost(blocks=(block,)) for block in (linear, attention)]
    assert mixed == pytest.approx([(3 * a + b) / 4 for a, b in zip(*pure, strict=True)], rel=1e-12)


def preset(size, vocab_size):
    config = importlib.import_module("configs.moe").get_config(f"size={size}")
    return override(config, {"model.vocab_size": vocab_size}).model


@pytest.mark.parametrize(
    ("size", "vocab_size", "total", "body", "active", "forward"),
    [
        ("mixtral-8x7b", 32000, 46_702_792_704, 46_440_648_704, 12_617_781_248, 26_571_177_984),
        ("qwen3-30b-a3b", 151936, 30_532_122_624, 29_909_792_768, 2_730_702_848, 7_694_319_616),
    ],
)
def test_published_mixtures_of_experts(size, vocab_size, total, body, active, forward):
    config = preset(size, vocab_size)
    counts = flops.counts(config)
    assert (counts.total, counts.non_embedding) == (total, body)
    assert counts.active - counts.embedding - counts.unembedding == active
    assert flops.per_token(config, 4096).forward == forward


def test_ling_mini_by_hand():
    """Section 5.3 of the specification: first layer dense, one shared expert; the selection bias is no parameter."""
    D, H, Hk, d, Ne, k, Fe, F = 2048, 16, 4, 128, 256, 8, 512, 5120
    counts = flops.counts(preset("ling-mini", 157184))
    attention = 2 * D * H * d + 2 * D * Hk * d + 2 * d + 2 * D  # with QK-norm and the layer's two norms
    dense = 20 * attention + 3 * D * F + D
    assert counts.non_embedding == dense + 19 * (3 * D * Fe * (Ne + 1) + D * Ne)
    assert counts.active - 2 * 157184 * D == dense + 19 * (3 * D * Fe * (k + 1) + D * Ne)


def test_olmoe_has_7_billion_parameters_and_uses_1():
    counts = flops.counts(preset("olmoe", 50304))
    assert counts.total == pytest.approx(6.92e9, rel=0.002)
    assert counts.active == pytest.approx(1.28e9, rel=0.005)
