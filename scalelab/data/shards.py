"""The `tokens` source: a folder of memory-mapped shards and the manifest that `data.build` wrote last.

manifest.json          schema, tokenizer, counts, and the length and SHA-256 of every other file
tokenizer.json         unless tokens are bytes
train-00000.bin ...    little-endian uint16 or uint32: bos document bos document ..., shuffled
held_out-00000.bin ... the held-out documents likewise, in the order of their hash
held_out.npy           (documents, 2) int64: tokens without bos, UTF-8 bytes
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from scalelab.data import tokenizers
from scalelab.data.stream import TokenSource
from scalelab.errors import BadInput

SCHEMA = 1
_FIELDS = {
    "tokenizer", "tokenizer_file", "vocab_size", "bos", "dtype", "documents", "bytes", "train", "held_out",
    "held_out_documents", "inputs", "content", "plan",
}  # fmt: skip
_REBUILD = "build it again (`scalelab data build`)"


def manifest(path: str, field: str) -> dict[str, Any]:
    """The manifest of a finished build. Raises `BadInput`."""
    file = pathlib.Path(path, "manifest.json")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        schema = int(document["schema"])
        if schema <= SCHEMA and (missing := _FIELDS - document.keys()):
            raise KeyError(", ".join(sorted(missing)))
    except OSError as error:
        unfinished = pathlib.Path(path, ".build").is_dir()
        remedy = (
            "holds a build that is not finished; give its command again"
            if unfinished
            else (f"must be a folder made by `scalelab data build`, with a manifest.json ({error.strerror})")
        )
        raise BadInput(field, path, remedy) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(field, path, f"has a manifest.json that can't be read ({error}); {_REBUILD}") from None
    if schema > SCHEMA:
        raise BadInput(field, path, f"has manifest schema {schema}; this scalelab reads up to {SCHEMA}: upgrade it")
    return document


def read(path: str, field: str) -> TokenSource:
    """Opens the shards. Sizes are checked here, content by `verify`. Raises `BadInput`."""
    document = manifest(path, field)
    folder = pathlib.Path(path)
    for entry in _files(document):
        _check_size(folder, entry, field)
    tokenizer = _tokenizer(folder, document, field)
    dtype = np.dtype(document["dtype"])
    parts, held = (
        [np.memmap(folder / entry["file"], dtype, "r") for entry in document[split]] for split in ("train", "held_out")
    )
    lengths, sizes = np.load(folder / document["held_out_documents"]["file"]).T
    # Documents lie end to end, each behind its bos; a shard begins with one.
    starts = np.cumsum(lengths + 1) - lengths
    firsts = np.concatenate(([0], np.cumsum([len(part) for part in held])))
    shard = np.searchsorted(firsts, starts, "right") - 1
    documents = [
        held[k][start - firsts[k] : start - firsts[k] + length]
        for k, start, length in zip(shard, starts, lengths, strict=True)
    ]
    return TokenSource(
        tokenizer=tokenizer,
        parts=parts,
        held_out=documents,
        held_out_bytes=sizes.tolist(),
        lossy=document["held_out_documents"]["lossy"],
        documents=document["documents"],
        bytes=document["bytes"],
        content=document["content"],
        files=len(document["inputs"]),
    )


def verify(path: str) -> None:
    """Compares the SHA-256 of every file with the manifest. Raises `BadInput` that names the first that differs."""
    document = manifest(path, "data verify")
    folder = pathlib.Path(path)
    for entry in _files(document):
        _check_size(folder, entry, "data verify")
        if sha256(folder / entry["file"]) != entry["sha256"]:
            raise BadInput("data verify", path, f"{entry['file']} is not what was built (its hash differs); {_REBUILD}")
    if content(document) != document["content"]:
        raise BadInput("data verify", path, f"manifest.json was altered; {_REBUILD}")


def content(document: dict[str, Any]) -> str:
    """What a run's id knows of the source: tokenizer and tokens, never path or the names of the inputs."""
    hashes = [entry["sha256"] for entry in _files(document)]
    text = json.dumps(["tokens-1", document["tokenizer"], document["vocab_size"], document["dtype"], hashes])
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(file: pathlib.Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(document: dict[str, Any]) -> list[dict[str, Any]]:
    tokenizer = [document["tokenizer_file"]] if document["tokenizer_file"] else []
    return [*document["train"], *document["held_out"], document["held_out_documents"], *tokenizer]


def _check_size(folder: pathlib.Path, entry: dict[str, Any], field: str) -> None:
    file = folder / entry["file"]
    try:
        size = file.stat().st_size
    except OSError as error:
        raise BadInput(field, str(folder), f"{entry['file']} can't be read ({error.strerror}); {_REBUILD}") from None
    if size != entry["bytes"]:
        remedy = f"{entry['file']} has {size} bytes, not {entry['bytes']} as built: cut or altered; {_REBUILD}"
        raise BadInput(field, str(folder), remedy)


def open_tokenizer(path: str, field: str) -> tokenizers.Tokenizer:
    return _tokenizer(pathlib.Path(path), manifest(path, field), field)


def _tokenizer(folder: pathlib.Path, document: dict[str, Any], field: str) -> tokenizers.Tokenizer:
    entry = document["tokenizer_file"]
    if not entry:
        return tokenizers.Bytes()
    if sha256(folder / entry["file"]) != entry["sha256"]:
        raise BadInput(field, str(folder), f"{entry['file']} was altered; {_REBUILD}")
    return tokenizers.load(str(folder / entry["file"]), field)
