"""Tokenizers: text <-> token ids. All of them add one id of ours, `bos`, that begins every document.

`bytes` is the 256 byte values; any other is a Hugging Face `tokenizer.json`. A tokenizer is known by the hash of what
it does (its `fingerprint`), never by where it lies.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from scalelab.errors import BadInput


class Tokenizer(Protocol):
    """vocab_size counts `bos`, which is the last id. `lossless`: decoding always gives the text back exactly."""

    vocab_size: int
    bos: int
    fingerprint: str
    lossless: bool

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]: ...


class Bytes:
    """Token = byte of the UTF-8 text; 256 begins a document. vocab_size 257."""

    vocab_size, bos, fingerprint, lossless = 257, 256, "bytes", True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(document, np.uint8) for document in documents]


class HuggingFace:
    """A tokenizer.json of the `tokenizers` library, without its own special-token template.

    `bos` is one past the file's largest id, so that ids are as in the file and no text can spell a separator.
    """

    lossless = False  # that depends on the text; checked on the documents that are scored

    def __init__(self, text: str, field: str = "tokenizer", where: str = "tokenizer.json"):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise BadInput(field, where, f"is not a tokenizer.json ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = text
        self.bos = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = self.bos + 1
        canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.bos], skip_special_tokens=False)

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Arrays of ids, of `dtype_for(vocab_size)`; in slices, since each Encoding also holds offsets and strings."""
        encoded: list[np.ndarray] = []
        for first in range(0, len(documents), 64):
            texts = [document.decode() for document in documents[first : first + 64]]
            batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encoded += [np.array(encoding.ids, dtype_for(self.vocab_size)) for encoding in batch]
        return encoded


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE with GPT-2's pre-tokenization: encodes any text, and gives it back.

    vocab_size counts `bos`: 256 bytes, bos, and at most vocab_size - 257 merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str()


def dtype_for(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type that tokens are stored in."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def load(reference: str, field: str = "config.data.tokenizer") -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json. Raises `BadInput` for anything else."""
    if reference == "bytes":
        return Bytes()
    path = pathlib.Path(reference)
    try:
        return HuggingFace(path.read_text(encoding="utf-8"), field, reference)
    except UnicodeDecodeError:
        raise BadInput(field, reference, "is not a tokenizer.json (not UTF-8)") from None
    except OSError as error:
        remedy = f"must be bytes or the path of a tokenizer.json ({error.strerror})"
        raise BadInput(field, reference, remedy) from None


def survives(tokenizer: Tokenizer, document: bytes, ids: Iterable[int]) -> bool:
    """Whether decoding gives the document back byte for byte, which is what makes its bits per byte a code length."""
    return tokenizer.lossless or tokenizer.decode(ids).encode() == document
