"""Random numbers by number: row i of a key, whatever was drawn before it.

Philox (Salmon et al., SC 2011) is a function of (key, counter); a key is a hash of what the rows are.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Float, Int64

Key = tuple[int, int]


def key(*parts: object) -> Key:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def uniform(philox: np.random.Philox, n: int) -> np.ndarray:
    """[0, 1) from the raw words, which NumPy promises to keep; its `Generator` streams may change."""
    return (philox.random_raw(n) >> np.uint64(11)) * 2.0**-53


def rows(key: Key, indices: Int64[np.ndarray, " rows"], n: int, attempt: int = 0) -> Float[np.ndarray, "rows n"]:
    """n numbers in [0, 1) for each row; another attempt at the same row has others."""
    out = np.empty((len(indices), n))
    philox = np.random.Philox(key=np.array(key, np.uint64))
    state = philox.state  # of a fresh generator: only its counter differs from row to row
    for row, index in zip(out, indices.tolist(), strict=True):
        state["state"]["counter"] = np.array([0, 0, index, attempt], np.uint64)
        philox.state = state
        row[:] = uniform(philox, n)
    return out
