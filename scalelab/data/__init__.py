"""Data: text, token shards and a synthetic language as batches that are a pure function of (seed, step)."""

from scalelab.data.builder import build
from scalelab.data.corpus import Corpus, fingerprint, open
from scalelab.data.shards import verify
from scalelab.data.stream import HeldOut

__all__ = ["Corpus", "HeldOut", "build", "fingerprint", "open", "verify"]
