"""What of exchange with the Hugging Face layout is refused: one line each, and nothing half-written."""

import itertools
import json
import math

import numpy as np
import pytest

from scalelab import exchange
from scalelab.errors import BadInput
from scalelab.exchange.convert import LAYOUTS, read_config
from tests.exchanged import GLOBAL, GPT2, LOCAL, MAMBA2, MODELS, MOE, drawn, edit, rewrite, tensors
from tests.models.family import section


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"model_type": "gemma3"}, "config.json: model_type = 'gemma3': cannot be read; known: gpt2"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_act": "relu2"}, "config.json: hidden_act = 'relu2': cannot be expressed; known: silu"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "scaled rotary embedding"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "scaled rotary"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "scaled rotary embedding"),
        ("llama", {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "part of each head"),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta = -1.0: must be a positive number"),
        ("llama", {"hidden_size": None}, "config.json: hidden_size = None: is missing"),
        ("llama", {"hidden_size": "wide"}, "config.json: hidden_size = 'wide': must be a number"),
        ("llama", {"num_hidden_layers": 10**9}, "must be at most 10000"),
        ("llama", {"num_hidden_layers": 1.5}, "must be a whole number"),
        ("llama", {"tie_word_embeddings": "yes"}, "must be true or false"),
        ("llama", {"num_key_value_heads": 3}, "must divide heads = 4"),
        ("llama", {"attention_bias": True}, "tensor = 'model.layers.0.self_attn.q_proj.bias': is missing"),
        ("llama", {"num_hidden_layers": 1}, "is no part of LlamaForCausalLM with this config.json (9 such)"),
        ("llama", {"intermediate_size": 25}, "has shape (24, 16), config.json says (25, 16)"),
        ("llama", {"model_type": ["x"]}, "config.json: model_type = ['x']: cannot be read"),
        ("llama", {"rope_scaling": "x"}, "config.json: rope_scaling = 'x': must be an object"),
        ("llama", {"rope_parameters": [1]}, "config.json: rope_parameters = [1]: must be an object"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "must be a positive number"),
        ("llama", {"hidden_act": ["silu"]}, "config.json: hidden_act = ['silu']: cannot be expressed"),
        ("llama", {"num_key_value_heads": "2"}, "config.json: num_key_value_heads = '2': must be a number"),
        ("llama", {"num_attention_heads": 0}, "must divide hidden_size = 16"),
        ("llama", {"hidden_size": 10**400}, "must be a number"),
        ("mistral", {"sliding_window": "4"}, "config.json: sliding_window = '4': must be a number"),
        ("gpt2", {"n_inner": "24"}, "config.json: n_inner = '24': must be a number"),
        ("gpt2", {"activation_function": "relu"}, "must be gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "must be False"),
        ("gpt2", {"add_cross_attention": True}, "must be False"),
        ("gpt2", {"n_head": 3}, "must divide n_embd = 16"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"]}, "must be 3 times full_attention or sliding_attention"),
        ("qwen3", {"layer_types": [["x"], {}, None]}, "must be 3 times full_attention or sliding_attention"),
        ("qwen3", {"use_sliding_window": False}, "sliding_window"),
        ("qwen3", {"use_sliding_window": "no"}, "config.json: use_sliding_window = 'no': must be true or false"),
        ("mixtral", {"num_experts_per_tok": 1}, "the weight of a single expert is not made 1"),
        ("mixtral", {"hidden_act": "gelu"}, "must be 'silu'"),
        ("qwen3_moe", {"mlp_only_layers": "none"}, "must be a list"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "must be a list of numbers of layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "must be at least 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "tensor = 'model.layers.0.mlp.gate_proj.weight': is missing"),
        ("mamba", {"use_bias": True}, "config.json: use_bias = True: cannot be expressed: must be False"),
        ("mamba", {"hidden_act": "gelu"}, "must be 'silu'"),
        ("mamba2", {"layer_norm_epsilon": 1e-6}, "the norm after the gate has 1e-05"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, "time steps are not clamped"),
        ("mamba2", {"time_step_limit": 5}, "config.json: time_step_limit = 5: cannot be expressed"),
        ("mamba2", {"num_heads": 4}, "must be expand * hidden_size / head_dim"),
        ("xlstm", {"weight_mode": "fused"}, "must be 'single'"),
        ("xlstm", {"v_dim_factor": 2.0}, "must be 1.0"),
        ("xlstm", {"ffn_round_up_to_multiple_of": 0}, "must be at least 1"),
        ("xlstm", {"ffn_proj_factor": 1e308}, "times hidden_size = 16 is no width"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_said_in_one_line(name, changes, says, tmp_path):
    folder = exchange.to_hf(MODELS[name], drawn(MODELS[name]), tmp_path / "out")
    edit(folder, **changes)
    with pytest.raises(BadInput) as error:
        exchange.from_hf(folder)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# Of a class's fields those that its layout reads by itself.
READ = (
    "model_type", "quantization_config", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor",
    "head_dim", "num_key_value_heads", "n_inner", "sliding_window", "layer_types", "time_step_limit",
)  # fmt: skip
ODD = (
    "x", "", "3", [], ["x"], [1], [None], [[1]], {}, {"x": [1]}, {"rope_type": ["x"]}, {"rope_theta": "x"},
    {"rope_theta": 10**400}, {"rope_theta": math.nan}, {"partial_rotary_factor": [1]}, [0.0, {"__float__": ["x"]}],
    None, True, False, -1, 0, 1, 0.5, -0.5, 1e308, 10**400, math.inf, math.nan,
)  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_field_of_config_json_makes_a_traceback(kind, tmp_path):
    """Read, or refused in one line."""
    layout = LAYOUTS[kind]
    folder = exchange.to_hf(MODELS[kind], drawn(MODELS[kind]), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    document = {name: value for name, value in written.items() if value is not None}
    fields = {*READ, *document, *layout.same.values(), *layout.defaults, *layout.theirs}
    fields |= {*layout.aliases, *layout.aliases.values()}
    refused = []
    for field, odd in itertools.product(sorted(fields), ODD):
        try:
            read_config(document | {field: odd})
        except BadInput as error:
            refused.append(str(error))
    assert len(refused) > len(ODD) * len(layout.same) / 2
    assert not any("\n" in line for line in refused)


def test_a_number_too_long_and_brackets_too_deep_are_no_json(tmp_path):
    for text in ('{"vocab_size": ' + "1" * 5000 + "}", '{"vocab_size": ' + "[" * 200_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match="is not JSON"):
            exchange.from_hf(tmp_path)


def test_files_that_cannot_be_imported(tmp_path):
    folder = exchange.to_hf(MODELS["mamba2"], drawn(MODELS["mamba2"]), tmp_path / "out")
    norm = tensors(folder)["backbone.norm_f.weight"]
    for changes, says in (
        ({"backbone__norm_f__weight": None}, "'backbone.norm_f.weight': is missing"),
        ({"backbone__norm_f__weight": norm[1:]}, r"has shape \(15,\), config.json says \(16,\)"),
        ({"backbone__norm_f__weight": norm.astype(np.int8)}, "of type I8 cannot be read"),
        ({"backbone__norm_f__weight": norm, "backbone__extra": norm}, "'backbone.extra': is no part of Mamba2"),
    ):
        rewrite(folder, **changes)
        with pytest.raises(BadInput, match=says):
            exchange.from_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"has no model\.safetensors"):
        exchange.from_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="is not JSON"):
        exchange.from_hf(folder)
    with pytest.raises(BadInput, match="cannot be read"):
        exchange.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"placement": "peri"}, "config.model.placement = 'peri': cannot be exported: LlamaForCausalLM has 'pre'"),
        ({"placement": "post"}, "config.model.placement = 'post'"),
        ({"blocks": (("slstm", "mlp"),)}, "config.model.blocks = 'slstm': cannot be exported"),
        ({"blocks": (("mlstm_up", "none"),)}, "config.model.blocks = 'mlstm_up': cannot be exported"),
        ({"blocks": (("mamba2", "none"), ("attention", "mlp")), "mamba2__head_dim": 4}, "'attention+mamba2'"),
        ({"blocks": (("attention", "none"),)}, "the channel mixer of every layer of LlamaForCausalLM is mlp"),
        ({"parscale__streams": 2}, "config.model.parscale.streams = 2: cannot be exported"),
        ({"embed_norm": True}, "config.model.embed_norm = True"),
        ({"logit_cap": 5.0}, "config.model.logit_cap = 5.0"),
        ({"attention__soft_cap": 5.0}, "config.model.attention.soft_cap = 5.0"),
        ({"attention__rope_theta": 0.0}, "attention without rotation"),
        ({"mlp__kind": "gelu"}, "must be swiglu or geglu"),
        ({"positions": 9}, "config.model.positions = 9"),
        ({"norm": "layernorm_gain"}, "GPT2LMHeadModel has 'layernorm'"),
        ({**GPT2, "positions": 0}, "GPT2LMHeadModel has learned positions"),
        ({**GPT2, "attention__kv_heads": 2}, "as many as heads = 4"),
        ({**GPT2, "attention__head_dim": 8}, "must be width / heads"),
        ({"attention__heads": 6, "attention__qk_norm": False}, "wants a divisor of the width 16"),
        ({"blocks": (LOCAL, ("attention", "mlp", {"window": 2})), "attention__qk_norm": True}, "of one size"),
        ({"blocks": (LOCAL, GLOBAL)}, "config.model.attention.window = '(varies)'"),
        ({"blocks": (("attention", "mlp", {"qk_norm": True}), GLOBAL)}, "not the same in all layers"),
        ({**MAMBA2, "norm_eps": 1e-6}, "one for all norms"),
        ({**MOE, "moe__router": "sigmoid"}, "config.model.moe.router = 'sigmoid': cannot be exported"),
        ({**MOE, "moe__shared": 1}, "config.model.moe.shared = 1"),
        ({**MOE, "moe__normalise": False}, "MixtralForCausalLM has True"),
        ({**MOE, "moe__top_k": 1}, "makes the weight of a single expert 1"),
        ({**MOE, "moe__top_k": 1, "attention__qk_norm": True}, "set normalise = False"),
        ({"recursion__count": 2}, "config.model.recursion.count = 2: cannot be exported"),
        ({**MOE, "prefix": (GLOBAL,)}, "the channel mixer of every layer of MixtralForCausalLM is moe"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line_and_nothing_is_written(changes, says, tmp_path):
    config = section(**changes)
    with pytest.raises(BadInput) as error:
        exchange.to_hf(config, drawn(config), tmp_path / "out")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model(tmp_path):
    with pytest.raises(BadInput, match=r"params\.embed = \(23, 16\): the model section has \(24, 16\)"):
        exchange.to_hf(section(vocab_size=24), drawn(section()), tmp_path / "out")
    with pytest.raises(BadInput, match=r"params\.unembed = None: the model section has \(16, 23\)"):
        exchange.to_hf(section(tied_embeddings=False), drawn(section()), tmp_path / "out")


def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch):
    config = section()
    old = exchange.to_hf(config, drawn(config), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in old.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scalelab.exchange.files.save_file", full)
    for name in ("out", "new"):
        with pytest.raises(BadInput, match="cannot be written: No space left"):
            exchange.to_hf(config, drawn(config, 1), tmp_path / name)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
