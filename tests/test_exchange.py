"""Exchange with the Hugging Face layout, without transformers: names, shapes and order of what is written, exact round
trips, and what is refused. `test_exchange_transformers.py` compares with transformers itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scalelab import exchange, models
from scalelab.errors import BadInput
from scalelab.exchange.convert import choose, read_config, write_config
from scalelab.exchange.layout import Ours, stack
from scalelab.models.registry import resolve
from tests.exchanged import GLOBAL, GPT2, MAMBA2, MODELS, MOE, XLSTM, drawn, edit, equal, tensors
from tests.models.family import section

each = pytest.mark.parametrize("name", MODELS)


def essence(config):
    """What of a section its logits depend on, layer by layer (chunks change the order of sums only)."""
    spec = resolve(config)
    names = ("vocab_size", "width", "norm", "norm_eps", "placement", "embed_norm", "positions", "tied_embeddings")
    options = [(block.mixer_options, block.channel_options) for block in spec.blocks]
    layers = [[{**vars(part), "chunk": 0} for part in parts if part is not None] for parts in options]
    return [getattr(spec, name) for name in (*names, "logit_cap")], layers


# ------------------------------------------------------------------------------------ round trips


@each
def test_there_and_back_is_exact(name, tmp_path):
    config, params = MODELS[name], drawn(MODELS[name])
    folder = exchange.to_hf(config, params, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again, back = exchange.from_hf(folder)
    assert essence(again) == essence(config)
    equal(back, params)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 23, (2, 9)))
    logits = models.logits(again, back, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, models.logits(config, params, tokens), rtol=1e-5, atol=1e-6)


def test_a_tied_xlstm_is_written_untied(tmp_path):
    """Its class in transformers cannot tie."""
    config = section(**XLSTM)
    params = drawn(config)
    folder = exchange.to_hf(config, params, tmp_path / "out")
    np.testing.assert_array_equal(tensors(folder)["lm_head.weight"], params["embed"])
    again, back = exchange.from_hf(folder)
    assert not again.tied_embeddings
    tokens = jnp.arange(7)[None]
    np.testing.assert_array_equal(models.logits(again, back, tokens), models.logits(config, params, tokens))


def test_layers_are_stacked_with_the_least_written_out():
    assert stack("aaaa") == {"prefix": (), "blocks": ("a",), "suffix": ()}
    assert stack("abababa") == {"prefix": (), "blocks": ("a", "b"), "suffix": ("a",)}
    assert stack("xaabaab") == {"prefix": ("x",), "blocks": ("a", "a", "b"), "suffix": ()}
    assert stack("abbbbb") == {"prefix": ("a",), "blocks": ("b",), "suffix": ()}
    assert stack("abc") == {"prefix": (), "blocks": ("a",), "suffix": ("b", "c")}


# ------------------------------------------------------------------------------------ names, shapes, order

ATTENTION = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
GATED = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
DECODER = {
    "model.embed_tokens.weight": (23, 16),
    "model.norm.weight": (16,),
    **{f"model.layers.0.self_attn.{name}.weight": shape for name, shape in ATTENTION.items()},
    **{f"model.layers.0.mlp.{name}.weight": shape for name, shape in GATED.items()},
    "model.layers.0.post_attention_layernorm.weight": (16,),
}
PRE = {**DECODER, "model.layers.0.input_layernorm.weight": (16,)}
WRITTEN = {
    "GPT2LMHeadModel": (
        section(**GPT2, layers=1),
        {
            "transformer.wte.weight": (23, 16), "transformer.wpe.weight": (12, 16),
            "transformer.h.0.ln_1.weight": (16,), "transformer.h.0.ln_1.bias": (16,),
            "transformer.h.0.attn.c_attn.weight": (16, 48), "transformer.h.0.attn.c_attn.bias": (48,),
            "transformer.h.0.attn.c_proj.weight": (16, 16), "transformer.h.0.attn.c_proj.bias": (16,),
            "transformer.h.0.ln_2.weight": (16,), "transformer.h.0.ln_2.bias": (16,),
            "transformer.h.0.mlp.c_fc.weight": (16, 24), "transformer.h.0.mlp.c_fc.bias": (24,),
            "transformer.h.0.mlp.c_proj.weight": (24, 16), "transformer.h.0.mlp.c_proj.bias": (16,),
            "transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,),
        },
    ),
    "LlamaForCausalLM": (section(layers=1, tied_embeddings=False), {**PRE, "lm_head.weight": (23, 16)}),
    "MistralForCausalLM": (section(layers=1, attention__window=3), PRE),
    "Qwen2ForCausalLM": (
        section(layers=1, attention__qkv_bias=True),
        PRE | {f"model.layers.0.self_attn.{n}_proj.bias": (s,) for n, s in (("q", 16), ("k", 8), ("v", 8))},
    ),
    "Qwen3ForCausalLM": (
        section(layers=1, attention__qk_norm=True),
        PRE | {f"model.layers.0.self_attn.{name}_norm.weight": (4,) for name in "qk"},
    ),
    "Olmo2ForCausalLM": (
        section(layers=1, placement="out", attention__qk_norm=True, attention__qk_norm_full=True),
        {
            **DECODER,
            "model.layers.0.self_attn.q_norm.weight": (16,), "model.layers.0.self_attn.k_norm.weight": (8,),
            "model.layers.0.post_feedforward_layernorm.weight": (16,),
        },
    ),
    "MixtralForCausalLM": (
        section(**MOE, layers=1),
        {name: shape for name, shape in PRE.items() if ".mlp." not in name}
        | {"model.layers.0.block_sparse_moe.gate.weight": (5, 16)}
        | {
            f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight": shape
            for e in range(5)
            for name, shape in (("w1", (12, 16)), ("w2", (16, 12)), ("w3", (12, 16)))
        },
    ),
    "Qwen3MoeForCausalLM": (
        section(**MOE, attention__qk_norm=True, prefix=(GLOBAL,)),
        PRE
        | {name.replace(".0.", ".1."): shape for name, shape in PRE.items() if ".mlp." not in name}
        | {f"model.layers.{layer}.self_attn.{name}_norm.weight": (4,) for name in "qk" for layer in (0, 1)}
        | {"model.layers.1.mlp.gate.weight": (5, 16)}
        | {
            f"model.layers.1.mlp.experts.{e}.{name}.weight": shape
            for e in range(5)
            for name, shape in (("gate_proj", (12, 16)), ("up_proj", (12, 16)), ("down_proj", (16, 12)))
        },
    ),
    "MambaForCausalLM": (
        section(layers=1, blocks=(("mamba", "none"),), mamba__state=3, mamba__dt_rank=2),
        {
            "backbone.embeddings.weight": (23, 16), "backbone.norm_f.weight": (16,),
            "backbone.layers.0.norm.weight": (16,), "backbone.layers.0.mixer.in_proj.weight": (64, 16),
            "backbone.layers.0.mixer.conv1d.weight": (32, 1, 4), "backbone.layers.0.mixer.conv1d.bias": (32,),
            "backbone.layers.0.mixer.x_proj.weight": (8, 32), "backbone.layers.0.mixer.dt_proj.weight": (32, 2),
            "backbone.layers.0.mixer.dt_proj.bias": (32,), "backbone.layers.0.mixer.A_log": (32, 3),
            "backbone.layers.0.mixer.D": (32,), "backbone.layers.0.mixer.out_proj.weight": (16, 32),
        },
    ),
    "Mamba2ForCausalLM": (
        section(layers=1, **MAMBA2),
        {
            "backbone.embeddings.weight": (23, 16), "backbone.norm_f.weight": (16,),
            "backbone.layers.0.norm.weight": (16,), "backbone.layers.0.mixer.in_proj.weight": (92, 16),
            "backbone.layers.0.mixer.conv1d.weight": (52, 1, 4), "backbone.layers.0.mixer.conv1d.bias": (52,),
            "backbone.layers.0.mixer.dt_bias": (8,), "backbone.layers.0.mixer.A_log": (8,),
            "backbone.layers.0.mixer.D": (8,), "backbone.layers.0.mixer.norm.weight": (32,),
            "backbone.layers.0.mixer.out_proj.weight": (16, 32),
        },
    ),
    "xLSTMForCausalLM": (
        section(layers=1, **XLSTM, tied_embeddings=False),
        {
            "backbone.embeddings.weight": (23, 16), "backbone.out_norm.weight": (16,), "lm_head.weight": (23, 16),
            "backbone.blocks.0.norm_mlstm.weight": (16,), "backbone.blocks.0.norm_ffn.weight": (16,),
            "backbone.blocks.0.mlstm_layer.q.weight": (8, 16), "backbone.blocks.0.mlstm_layer.k.weight": (8, 16),
            "backbone.blocks.0.mlstm_layer.v.weight": (16, 16),
            "backbone.blocks.0.mlstm_layer.ogate_preact.weight": (16, 16),
            "backbone.blocks.0.mlstm_layer.igate_preact.weight": (2, 16),
            "backbone.blocks.0.mlstm_layer.igate_preact.bias": (2,),
            "backbone.blocks.0.mlstm_layer.fgate_preact.weight": (2, 16),
            "backbone.blocks.0.mlstm_layer.fgate_preact.bias": (2,),
            "backbone.blocks.0.mlstm_layer.multihead_norm.weight": (16,),
            "backbone.blocks.0.mlstm_layer.out_proj.weight": (16, 16),
            "backbone.blocks.0.ffn.proj_up_gate.weight": (24, 16), "backbone.blocks.0.ffn.proj_up.weight": (24, 16),
            "backbone.blocks.0.ffn.proj_down.weight": (16, 24),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_names_and_shapes(kind, tmp_path):
    config, want = WRITTEN[kind]
    folder = exchange.to_hf(config, drawn(config), tmp_path / "out")
    assert {name: a.shape for name, a in tensors(folder).items()} == want
    document = json.loads((folder / "config.json").read_text())
    assert (document["architectures"], document["dtype"]) == ([kind], "float32")
    assert document["tie_word_embeddings"] is ("lm_head.weight" not in want)
    rebuilt = 0
    for a in tensors(folder).values():
        assert a.dtype == np.float32
        rebuilt += a.size
    assert rebuilt == sum(a.size for a in jax.tree.leaves(drawn(config)))


def test_order_inside_the_tensors(tmp_path):
    """Heads are merged head-major; joint matrices hold their parts in the published order."""
    config = MODELS["llama"]
    params = drawn(config)
    found = tensors(exchange.to_hf(config, params, tmp_path / "llama"))
    mixer = jax.tree.map(np.asarray, params["period"]["0"]["mixer"])
    for layer, head, inner, width in ((0, 0, 0, 0), (1, 3, 5, 11)):
        row = head * 6 + inner
        names = f"model.layers.{layer}.self_attn."
        assert found[names + "q_proj.weight"][row, width] == mixer["q"][layer, width, head, inner]
        assert found[names + "o_proj.weight"][width, row] == mixer["out"][layer, head, inner, width]
    np.testing.assert_array_equal(found["lm_head.weight"], np.asarray(params["unembed"]).T)

    config = MODELS["gpt2"]
    params = drawn(config)
    found = tensors(exchange.to_hf(config, params, tmp_path / "gpt2"))
    mixer = jax.tree.map(lambda a: np.asarray(a[1]), params["period"]["0"]["mixer"])
    joint = found["transformer.h.1.attn.c_attn.weight"]  # (in, out)
    assert joint[7, 2 * 4 + 1] == mixer["q"][7, 2, 1]
    assert joint[7, 16 + 2 * 4 + 1] == mixer["k"][7, 2, 1]
    assert joint[7, 32 + 2 * 4 + 1] == mixer["v"][7, 2, 1]
    assert found["transformer.h.1.attn.c_attn.bias"][32 + 9] == mixer["v_bias"][2, 1]
    np.testing.assert_array_equal(found["transformer.h.1.attn.c_proj.weight"], mixer["out"].reshape(16, 16))

    config = MODELS["mamba2"]
    params = drawn(config)
    found = tensors(exchange.to_hf(config, params, tmp_path / "mamba2"))
    mixer = jax.tree.map(lambda a: np.asarray(a[0]), params["period"]["0"]["mixer"])
    joint = found["backbone.layers.0.mixer.in_proj.weight"]  # z, x, B, C, dt
    np.testing.assert_array_equal(joint[:84], mixer["inward"].T)
    np.testing.assert_array_equal(joint[84:], mixer["dt"].T)
    assert found["backbone.layers.0.mixer.conv1d.weight"][50, 0, 3] == mixer["conv"][3, 50]


def test_fields_of_config_json(tmp_path):
    def written(config):
        return json.loads((exchange.to_hf(config, drawn(config), tmp_path / "out") / "config.json").read_text())

    got = written(MODELS["qwen3"])
    want = {
        "model_type": "qwen3", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }  # fmt: skip
    assert {name: got[name] for name in want} == want
    got = written(MODELS["gpt2"])
    want = {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 12,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    assert {name: got[name] for name in want} == want
    got = written(MODELS["mamba"])
    assert (got["time_step_rank"], got["intermediate_size"], got["expand"]) == (2, 32, 2)
    got = written(MODELS["xlstm"])
    assert (got["ffn_proj_factor"] * 16, got["output_logit_soft_cap"], got["use_cache"]) == (24, 30.0, False)
    with_more = exchange.to_hf(
        MODELS["gpt2"], drawn(MODELS["gpt2"]), tmp_path / "more", fields={"bos_token_id": 3}, files={"a.txt": "b"}
    )
    assert json.loads((with_more / "config.json").read_text())["bos_token_id"] == 3
    assert (with_more / "a.txt").read_text() == "b"


# ------------------------------------------------------------------------------------ other ways to write the same


def test_older_and_newer_fields_say_the_same(tmp_path):
    config, params = MODELS["llama"], drawn(MODELS["llama"])
    folder = exchange.to_hf(config, params, tmp_path / "out")
    new, _ = exchange.from_hf(folder)
    edit(folder, rope_parameters=None, rope_scaling=None, dtype=None)
    old, back = exchange.from_hf(folder)
    assert old.to_dict() == new.to_dict()
    assert old.attention.rope_theta == 500.0
    equal(back, params)
    edit(folder, rope_theta=None)
    assert exchange.from_hf(folder)[0].attention.rope_theta == 10000.0
    edit(folder, rope_parameters={"rope_theta": 77, "rope_type": "default"}, hidden_act="gelu")
    changed = exchange.from_hf(folder)[0]
    assert (changed.attention.rope_theta, changed.mlp.kind) == (77.0, "geglu")


def test_windows_from_a_layer_on(tmp_path):
    config = section(attention__qk_norm=True, layers=5, attention__head_dim=4)
    folder = exchange.to_hf(config, drawn(config), tmp_path / "out")
    edit(folder, use_sliding_window=True, sliding_window=3, max_window_layers=2, layer_types=None)
    spec = resolve(exchange.from_hf(folder)[0])
    assert [block.mixer_options.window for block in spec.blocks] == [0, 0, 3, 3, 3]
    edit(folder, max_window_layers=0)
    again, _ = exchange.from_hf(folder)
    assert (again.attention.window, len(again.blocks)) == (3, 1)
    edit(folder, use_sliding_window=False)
    assert exchange.from_hf(folder)[0].attention.window == 0


@pytest.mark.parametrize(("name", "absent"), [("mistral", 4096), ("mixtral", 0), ("qwen3_moe", 4096), ("qwen3", 4096)])
def test_a_window_that_is_null_is_none(name, absent):
    config, windows = MODELS[name], []
    document = write_config(choose(Ours(resolve(config))), Ours(resolve(config)))
    document |= {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    del document["sliding_window"]
    for more in ({"sliding_window": None}, {"sliding_window": 3}, {}):
        windows.append(read_config(document | more).attention.window)
    assert windows == [0, 3, absent]


def test_bare_names_buffers_half_precision_and_a_stored_head(tmp_path):
    """As in the published GPT-2: no `transformer.` in front, masks stored; 16 bit numbers; the tied head stored too."""
    config, params = MODELS["gpt2"], drawn(MODELS["gpt2"])
    folder = exchange.to_hf(config, params, tmp_path / "out")
    found = tensors(folder)
    bare = {name.removeprefix("transformer."): a for name, a in found.items()}
    mask = np.tril(np.ones((1, 1, 12, 12), np.float32))
    head = {"lm_head.weight": found["transformer.wte.weight"]}
    save_file(bare | {f"h.{i}.attn.bias": mask for i in range(2)} | head, folder / "model.safetensors")
    equal(exchange.from_hf(folder)[1], params)
    save_file(bare | {"lm_head.weight": found["transformer.wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"lm_head\.weight is not the embedding"):
        exchange.from_hf(folder)
    for dtype in (np.float16, jnp.bfloat16):
        save_file({name: a.astype(dtype) for name, a in found.items()}, folder / "model.safetensors")
        back = exchange.from_hf(folder)[1]
        equal(back, jax.tree.map(lambda a, dtype=dtype: a.astype(dtype).astype(jnp.float32), params))


def test_shards(tmp_path):
    config, params = MODELS["qwen3"], drawn(MODELS["qwen3"])
    folder = exchange.to_hf(config, params, tmp_path / "out", shard_bytes=4000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    held = [set(load_file(folder / name)) for name in files]
    assert sum(map(len, held)) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == 4 * sum(a.size for a in jax.tree.leaves(params))
    equal(exchange.from_hf(folder)[1], params)
    assert exchange.to_hf(config, params, folder) == folder  # in one file again; no shard stays behind
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

    exchange.to_hf(config, params, folder, shard_bytes=4000)
    (folder / files[1]).write_bytes(b"nothing")
    with pytest.raises(BadInput, match=f"{files[1]}.*is not a safetensors file"):
        exchange.from_hf(folder)
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="no weight_map of tensors to files beside it"):
        exchange.from_hf(folder)
