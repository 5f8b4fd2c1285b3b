"""Data: text, token shards, a synthetic language and probes as batches, a pure function of (seed, step)."""

from scalelab.data.builder import build
from scalelab.data.corpus import Corpus, fingerprint, open, open_tokenizer
from scalelab.data.shards import verify
from scalelab.data.stream import HeldOut, split_rows

__all__ = ["Corpus", "HeldOut", "build", "fingerprint", "open", "open_tokenizer", "split_rows", "verify"]
