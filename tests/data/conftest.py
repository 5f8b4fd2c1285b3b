"""Helpers of the data tests, as fixtures that give functions."""

import pytest

from scalelab import config


@pytest.fixture
def settings():
    """(sources by name: a path or a dict, fields of config.data) -> config.data."""
    return _settings


@pytest.fixture
def held_texts():
    """Corpus -> source name -> the bytes of each held-out document, put together from the scored targets."""
    return _held_texts


def _settings(sources=None, **fields):
    changes = {f"data.{name}": value for name, value in fields.items()}
    if sources is not None:
        changes["data.sources"] = {
            name: source if isinstance(source, dict) else {"kind": "text", "path": str(source), "weight": 1.0}
            for name, source in sources.items()
        }
    return config.override(config.base(), changes).data


def _held_texts(corpus):
    out = {}
    for name, held in corpus.held_out().items():
        targets, doc = held.tokens[:, 1:].ravel(), held.doc.ravel()
        out[name] = []
        for i, size in enumerate(held.bytes):
            mine = targets[doc == i]
            assert mine[-1] == corpus.bos
            out[name].append(corpus.tokenizer.decode(mine[:-1]).encode())
            assert len(out[name][-1]) == size
    return out
