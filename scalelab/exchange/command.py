"""`scalelab export` and `scalelab import`: runs and imported models to and from the Hugging Face layout."""

from __future__ import annotations

import pathlib
from typing import Any

from scalelab import flops, restore
from scalelab.data import tokenizers
from scalelab.exchange.convert import from_hf, to_hf
from scalelab.exchange.files import TOKENIZER, load, read_json, save
from scalelab.schema import Config


def export_hf(path: pathlib.Path, out: pathlib.Path) -> str:
    """A run, or what `import_hf` wrote -> a folder for transformers; says what came of it.

    A run's tokenizer.json goes along as it is. Its separator of documents is one id past those of the file: config.json
    names it as bos_token_id and eos_token_id. A run on bytes has no file: its tokens are the bytes, and 256.
    """
    fields: dict[str, Any] = {}
    files = {}
    if (path / "model.json").is_file():
        config, params = load(path)
        if (path / TOKENIZER).is_file():
            files[TOKENIZER] = (path / TOKENIZER).read_text(encoding="utf-8")
    else:
        spec, tokenizer, config, params = restore.load(path)
        fields = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.bos}
        if config.positions == 0 and config.blocks[0][0] == "attention":
            fields["max_position_embeddings"] = spec.config.data.seq_len
        if isinstance(tokenizer, tokenizers.HuggingFace):
            files[TOKENIZER] = tokenizer.json
    to_hf(config, params, out, fields=fields, files=files)
    kind = read_json(out / "config.json")["architectures"][0]
    return f"{out}: {kind}, {_size(config)}" + (f", {TOKENIZER}" if files else "")


def import_hf(path: pathlib.Path, out: pathlib.Path) -> str:
    """A folder of transformers -> model.json, model.safetensors and, where it has one, tokenizer.json."""
    config, params = from_hf(path)
    files = {}
    if (path / TOKENIZER).is_file():
        files[TOKENIZER] = (path / TOKENIZER).read_text(encoding="utf-8")
    save(config, params, out, files)
    return f"{out}: {read_json(path / 'config.json')['model_type']}, {_size(config)}" + (
        f", {TOKENIZER}" if files else ""
    )


def _size(config: Config) -> str:
    return f"{flops.counts(config).total:,} parameters"
