"""Runs that go out to the Hugging Face layout and come back, our own layout, and what of a model is written at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import cli, exchange, models, recipe, restore, train
from scalelab.config import base, override
from scalelab.errors import BadInput
from scalelab.exchange.convert import choose, write_config
from scalelab.exchange.layout import Ours
from scalelab.models.registry import resolve
from tests.exchanged import MODELS, drawn, equal, tensors
from tests.helpers import small_corpus, tiny_spec

each = pytest.mark.parametrize("name", MODELS)


def test_save_and_load(tmp_path):
    config, params = MODELS["qwen3"], drawn(MODELS["qwen3"])
    folder = exchange.save(config, params, tmp_path / "own", {"tokenizer.json": "{}"})
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors", "tokenizer.json"]
    again, back = exchange.load(folder)
    assert again.to_dict() == config.to_dict()
    equal(back, params)
    assert "period.0.mixer.q" in tensors(folder)
    with pytest.raises(BadInput, match="another layout"):
        exchange.to_hf(config, params, folder)
    (folder / "model.json").write_text('{"schema": 2, "model": {}}')
    with pytest.raises(BadInput, match="is not a model of schema 1"):
        exchange.load(folder)


def test_no_tokenizer_of_another_model_stays(tmp_path):
    config, params = MODELS["qwen3"], drawn(MODELS["qwen3"])
    for name, write in (("out", exchange.to_hf), ("own", exchange.save)):
        folder = write(config, params, tmp_path / name, files={"tokenizer.json": "{}"})
        (folder / "notes.txt").write_text("mine")
        write(config, params, folder, files={"tokenizer.json": "[]"})
        assert (folder / "tokenizer.json").read_text() == "[]"
        write(config, params, folder)
        assert not (folder / "tokenizer.json").exists()
        assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_goes_out_and_comes_back(tmp_path, capsys):
    corpus = small_corpus(tmp_path / "corpus")
    spec = tiny_spec(corpus, train__steps=3)
    train.run(spec, tmp_path / "runs")
    assert cli.main(["export", str(tmp_path / "runs" / spec.id), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "parameters" in capsys.readouterr().out
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (document["bos_token_id"], document["eos_token_id"], document["vocab_size"]) == (256, 256, 257)
    assert document["max_position_embeddings"] == spec.config.data.seq_len
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert cli.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "own")]) == 0
    config, params = exchange.load(tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").read_text() == "{}"
    model = override(spec.config, {"model.vocab_size": 257, "model.compute_dtype": "float32"}).model
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 9)))
    trained = restore.load(tmp_path / "runs" / spec.id)[3]
    np.testing.assert_array_equal(models.logits(config, params, tokens), models.logits(model, trained, tokens))
    assert cli.main(["export", str(tmp_path / "own"), "--out", str(tmp_path / "again")]) == 0
    equal(exchange.from_hf(tmp_path / "again")[1], params)
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert cli.main(["import", str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir() if path.name != "tokenizer.json"}
    assert len(modes) == 1  # whoever may read the one may read the other
    capsys.readouterr()
    for command in ("export", "import"):
        assert cli.main([command, str(tmp_path / "hf"), "--out", ""]) == 2
        assert "--out = '': must name a folder" in capsys.readouterr().err


def test_mup_goes_out_at_the_shape_of_its_base(tmp_path):
    """There it is the standard parametrisation; beyond it has multipliers."""
    small = recipe.shape("transformer", 32)
    for width in (32, 64):
        changes = recipe.transferred("mup", recipe.shape("transformer", width), small)
        config = override(base(), {**changes, "model.vocab_size": 11, "model.compute_dtype": "float32"}).model
        params = models.init(config, jax.random.key(0))
        if width == 64:
            with pytest.raises(BadInput, match="beyond its base's shape"):
                exchange.to_hf(config, params, tmp_path / "wide")
            continue
        exchange.to_hf(config, params, tmp_path / "base")
        tokens = jnp.asarray([[3, 1, 4, 1, 5]])
        back = models.logits(*exchange.from_hf(tmp_path / "base"), tokens)
        np.testing.assert_allclose(back, models.logits(config, params, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba2 untied", "xlstm"])
@pytest.mark.parametrize("tied", [True, False])
def test_mups_multipliers_go_into_the_embedding_and_the_final_norm(name, tied, tmp_path):
    mup = {"base_width": 16, "base_layers": MODELS[name].layers, "embed_multiplier": 2.0, "logit_multiplier": 3.0}
    changes = {"parametrization": "mup", "tied_embeddings": tied, **{f"mup.{f}": value for f, value in mup.items()}}
    whole = base()
    whole.model = MODELS[name]
    config = override(whole, {f"model.{field}": value for field, value in changes.items()}).model
    params, tokens = drawn(config), jnp.arange(9)[None]
    back = models.logits(*exchange.from_hf(exchange.to_hf(config, params, tmp_path / "out")), tokens)
    np.testing.assert_allclose(back, models.logits(config, params, tokens), rtol=1e-4, atol=1e-5)


# What the logits do not depend on, or (muP's) what `to_hf` sees to, and the stack, which the layers tell.
NOT_WRITTEN = {
    "prefix", "period", "suffix", "repeats", "recursion", "init_kind", "init_std", "compute_dtype", "remat",
    "loss_chunk", "streams", "stream_prefix", "stream_smoothing", "base", "base_layers", "depth_scaled",
    "embed_multiplier", "logit_multiplier", "training", "kernels", "mesh", "unroll", "mamba.chunk",
    "moe.top_groups", "moe.capacity", "moe.lbl", "moe.lbl_scope", "moe.lbl_sequences", "moe.z_loss", "moe.bias_centred",
}  # fmt: skip


@each
def test_every_field_is_written_or_checked(name):
    class Noted(Ours):
        def __getitem__(self, name):
            seen.add(name)
            return super().__getitem__(name)

    seen = set()
    ours = Noted(resolve(MODELS[name]))
    layout = choose(ours)
    seen.clear()
    write_config(layout, ours)
    by_layer = {"attention.window"} if "qwen" in layout.model_type and "moe" not in layout.model_type else set()
    implied = {"attention.qkv_bias", "attention.qk_norm_full"} if layout.model_type == "gpt2" else set()
    assert set(ours.fields) - seen == (NOT_WRITTEN | by_layer | implied) & set(ours.fields)
