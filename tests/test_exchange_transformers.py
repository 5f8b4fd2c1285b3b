"""Exchange against transformers itself, on small random models: the same logits in float32, both ways."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import exchange, models
from tests.exchanged import GLOBAL, GPT2, LOCAL, MAMBA2, MODELS, drawn, equal
from tests.models.family import section

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports
    why = "compares with transformers: pip install 'scalelab[exchange]'"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

TOKENS = np.random.default_rng(0).integers(0, 23, (2, 21))
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, **NO_IDS,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 23, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, **NO_IDS}
MAMBA_SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **NO_IDS}
MAMBA2_SIZES = {**MAMBA_SIZES, "num_heads": 8, "head_dim": 4, "n_groups": 2, "chunk_size": 8}
MIXTRAL_SIZES = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12}
QWEN3_MOE_SIZES = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
# use_cache: its decoding state wants widths of at least 64.
XLSTM_SIZES = {
    "vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16, "use_cache": False,
    "autocast_kernel_dtype": "float32", **NO_IDS,
}  # fmt: skip
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
THEIRS = {
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "gpt2 untied": ("GPT2Config", {**GPT2_SIZES, **UNTIED, "n_inner": 24}),
    "llama": ("LlamaConfig", {**SIZES, **UNTIED}),
    "llama tied": ("LlamaConfig", {**SIZES, **TIED, **ROPE, "head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "llama gelu": ("LlamaConfig", {**SIZES, "hidden_act": "gelu"}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {**SIZES, **WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**SIZES, **UNTIED, "head_dim": 8, **ROPE}),
    "qwen3 windows": ("Qwen3Config", {**SIZES, **TIED, **WINDOW, "head_dim": 8, "max_window_layers": 2}),
    "olmo2": ("Olmo2Config", {**SIZES, **UNTIED}),
    "olmo2 tied": ("Olmo2Config", {**SIZES, **TIED, "attention_bias": True}),
    "mamba": ("MambaConfig", MAMBA_SIZES),
    "mamba untied": ("MambaConfig", {**MAMBA_SIZES, **UNTIED, "time_step_rank": 3}),
    "mamba2": ("Mamba2Config", {**MAMBA2_SIZES, **TIED}),
    "mamba2 untied": ("Mamba2Config", {**MAMBA2_SIZES, **UNTIED}),
    "mixtral": ("MixtralConfig", {**SIZES, **MIXTRAL_SIZES}),
    "mixtral tied": ("MixtralConfig", {**SIZES, **MIXTRAL_SIZES, **TIED, "head_dim": 6, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **QWEN3_MOE_SIZES, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe by step": ("Qwen3MoeConfig", {**SIZES, **QWEN3_MOE_SIZES, **TIED, "decoder_sparse_step": 2}),
    "xlstm": ("xLSTMConfig", XLSTM_SIZES),
}


def theirs(kind, fields):
    """Their model with every parameter off its start, so that each of them counts."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def our_logits(config, params):
    return jax.jit(lambda p, t: models.logits(config, p, t))(params, jnp.asarray(TOKENS))


def close(a, b):
    """Far inside the promised 1e-4, since the logits are of order 1."""
    assert np.abs(b).max() > 0.5
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_model_has_the_same_logits(name, tmp_path):
    model = theirs(*THEIRS[name])
    model.save_pretrained(tmp_path / "theirs")
    config, params = exchange.from_hf(tmp_path / "theirs")
    want = their_logits(model)
    close(our_logits(config, params), want)
    exchange.to_hf(config, params, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    for (key, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b), key
    close(their_logits(again), want)


OURS = {
    **MODELS,
    "gpt2": section(**{**GPT2, "positions": 21}),
    "gpt2 untied": section(**{**GPT2, "positions": 32}, tied_embeddings=False),
    "qwen3 pattern": section(
        attention__qk_norm=True, prefix=(GLOBAL,), blocks=(LOCAL, LOCAL, GLOBAL), layers=7, attention__head_dim=6
    ),
    "olmo2 wide heads": section(
        placement="out", attention__qk_norm=True, attention__qk_norm_full=True, attention__head_dim=6
    ),
    "mamba2 one group": section(**{**MAMBA2, "mamba2__groups": 1, "mamba2__conv": 3}),
    "xlstm tied": section(blocks=(("mlstm", "mlp"),), mlstm__heads=2, mlstm__qk_factor=1.0),
}


@pytest.mark.parametrize("name", OURS)
def test_an_exported_model_has_the_same_logits(name, tmp_path):
    config, params = OURS[name], drawn(OURS[name])
    exchange.to_hf(config, params, tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model.eval()
    close(their_logits(model), our_logits(config, params))


def test_shards_both_ways(tmp_path):
    model = theirs(*THEIRS["qwen3 windows"])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    config, params = exchange.from_hf(tmp_path / "theirs")
    close(our_logits(config, params), their_logits(model))
    exchange.to_hf(config, params, tmp_path / "ours", shard_bytes=6000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    close(
        their_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()), their_logits(model)
    )


def test_a_bfloat16_checkpoint_is_read_exactly(tmp_path):
    model = theirs(*THEIRS["llama"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    config, params = exchange.from_hf(tmp_path / "theirs")
    np.testing.assert_array_equal(params["embed"], model.model.embed_tokens.weight.detach().float().numpy())
    close(our_logits(config, params), their_logits(model.float()))


@pytest.mark.parametrize("name", ["gpt2", "qwen3 windows", "mamba2", "qwen3_moe"])
def test_generated_tokens_are_the_same(name, tmp_path):
    """Greedy, through their cache and our states."""
    model = theirs(*THEIRS[name])
    model.save_pretrained(tmp_path / "theirs")
    config, params = exchange.from_hf(tmp_path / "theirs")
    prompt = torch.tensor(TOKENS[:1, :9])
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    graphdef, _ = models.abstract(config)
    step = jax.jit(lambda p, token, state: models.merge(graphdef, p).step(token, state))
    ours = models.merge(graphdef, params)
    logits, state = ours.extend(jnp.asarray(TOKENS[:1, :9]), ours.init_state(1, 19))
    logits, written = logits[:, -1], []
    for _ in range(10):
        written.append(int(jnp.argmax(logits)))
        logits, state = step(params, jnp.asarray(written[-1:]), state)
    assert written == want[0, 9:].tolist()


def test_what_they_scale_is_refused(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    theirs("LlamaConfig", {**SIZES, "rope_parameters": rope}).save_pretrained(tmp_path)
    with pytest.raises(exchange.convert.BadInput, match="scaled rotary embedding"):
        exchange.from_hf(tmp_path)


def test_round_trip_through_their_classes_is_exact(tmp_path):
    config, params = MODELS["qwen3"], drawn(MODELS["qwen3"])
    exchange.to_hf(config, params, tmp_path / "ours")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again, back = exchange.from_hf(tmp_path / "theirs")
    assert again.to_dict() == exchange.from_hf(tmp_path / "ours")[0].to_dict()
    equal(back, params)
