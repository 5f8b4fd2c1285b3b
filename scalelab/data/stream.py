"""Token streams: cut into training windows, or into held-out windows that score every token once.

A row of T + 1 entries is read at positions 0 .. T-1 and predicted at each the next. An entry at or above 0 is a token:
what its position reads and what the one before must say. One below 0 holds both apart, a token and a label of its own
or none: so a task may ask for an answer that is never read, and score answers alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64

from scalelab.data import tokenizers

_BITS = 15  # of a token in an entry below 0; its label has as many
MOST_TOKENS = 2**_BITS - 1  # of a vocabulary with labels apart


def labelled(tokens: Int[np.ndarray, "n T+1"], labels: Int[np.ndarray, "n T"]) -> Int32[np.ndarray, "n T+1"]:
    """Rows in which position j reads tokens[:, j] and must say labels[:, j]; -1: nothing is asked there."""
    rows = tokens.astype(np.int32)
    rows[:, 1:] = -1 - (rows[:, 1:] + ((labels.astype(np.int32) + 1) << _BITS))
    return rows


def split_rows(rows: Any) -> tuple[Any, Any]:
    """Rows (B, T + 1), of NumPy or JAX -> (tokens read, targets), both (B, T); a target of -1 is not scored."""
    where, code = rows.__array_namespace__().where, -1 - rows
    tokens = where(rows < 0, code & MOST_TOKENS, rows)
    targets = where(rows < 0, (code >> _BITS) - 1, rows)
    return tokens[:, :-1], targets[:, 1:]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out documents of one source, as windows that overlap by one token, so that each target is scored once.

    tokens: row i predicts tokens[i, 1:] from tokens[i, :-1]. doc: the document that the *target* belongs to, an index
    into `bytes`; -1 where the last row is padded or nothing is asked. The `bos` that ends a document is scored with it.
    bytes: UTF-8 bytes of each document: bits per byte = sum of nats / (ln 2 * sum of bytes), over any set of whole
    documents.
    """

    tokens: Int32[np.ndarray, "n T+1"]
    doc: Int32[np.ndarray, "n T"]
    bytes: Int64[np.ndarray, " docs"]


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """What a source of text comes to. Everything is known but the window length.

    parts: arrays which, end to end, are the training stream `bos document bos document ...`; they may be memory maps.
    held_out: documents (without bos), in hash order, each once, that decode to themselves; held_out_bytes: their UTF-8
    bytes. lossy: how many held-out documents were left out because the tokenizer does not give them back.
    """

    tokenizer: tokenizers.Tokenizer
    parts: Sequence[np.ndarray]
    held_out: Sequence[np.ndarray]
    held_out_bytes: Sequence[int]
    lossy: int
    documents: int
    bytes: int
    content: str
    files: int = 0
    skipped: int = 0


class Windows:
    """Windows of T + 1 tokens at stride T over the parts, end to end: window i is stream[i*T : i*T + T + 1]."""

    def __init__(self, parts: Sequence[np.ndarray], seq_len: int):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.seq_len = seq_len
        self.tokens = int(self._ends[-1]) if len(parts) else 0
        self.count = max(0, (self.tokens - 1) // seq_len)

    def rows(self, indices: Int[np.ndarray, " n"]) -> Int32[np.ndarray, "n T+1"]:
        out = np.empty((len(indices), self.seq_len + 1), np.int32)
        starts = np.asarray(indices, np.int64) * self.seq_len
        for row, start, part in zip(out, starts, np.searchsorted(self._ends, starts, "right"), strict=True):
            filled = 0
            while filled < len(row):  # a window may straddle parts
                offset = start + filled - self._ends[part] + len(self._parts[part])
                piece = self._parts[part][offset : offset + len(row) - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                part += 1
        return out


def held_out_windows(documents: Sequence[np.ndarray], sizes: Sequence[int], bos: int, seq_len: int) -> HeldOut:
    """`bos d_0 bos d_1 ... bos` in windows that overlap by one token; the last is padded with bos, doc -1."""
    lengths = np.array([len(document) + 1 for document in documents])  # with the bos that ends it
    targets = int(lengths.sum())
    n = -(-targets // seq_len)
    stream = np.full(n * seq_len + 1, bos, np.int32)
    doc = np.full(n * seq_len, -1, np.int32)
    doc[:targets] = np.repeat(np.arange(len(documents)), lengths)
    start = 1
    for document in documents:
        stream[start : start + len(document)] = document
        start += len(document) + 1
    index = np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)
    return HeldOut(stream[index], doc.reshape(n, seq_len), np.array(sizes, np.int64))
