"""The pairs bootstrap: whole runs, or whole clusters of them, drawn with replacement, as row counts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws.table import Rows

ROUNDS = 50  # attempts at drawing a resample that can be fitted at all


def resample(
    rows: Rows, bootstrap: int | Int[np.ndarray, "draws table"], seed: int, distinct: int
) -> tuple[Float[np.ndarray, "draws n"], int]:
    """Row counts of each resample, and how many resamples were drawn again.

    A resample with fewer than `distinct` different rows cannot identify the law and is drawn again, `ROUNDS` times at
    most. An array of row indices (of the caller's table) is taken as it is. The draws depend on the seed and on the
    rows, not on their order.
    """
    n = len(rows)
    if not isinstance(bootstrap, int | np.integer):
        return _from_indices(rows, np.asarray(bootstrap)), 0
    draws = int(bootstrap)
    if draws < 0:
        raise BadInput(
            "bootstrap", draws, "must be 0 (none), a number of draws, or an array (draws, rows) of row indices"
        )
    rng = np.random.default_rng(seed)
    order = rows.order()
    if rows.clusters is None:
        group = np.arange(n)
    else:  # number clusters by their first row in canonical order
        _labels, first, inverse = np.unique(rows.clusters[order], return_index=True, return_inverse=True)
        group = np.argsort(np.argsort(first))[inverse]
    groups = int(group.max()) + 1
    if groups < 2:
        raise BadInput("cluster", "1 cluster", "a bootstrap over clusters needs at least 2 of them")
    counts = np.zeros((draws, n))
    wanting = np.arange(draws)
    again = 0
    for attempt in range(ROUNDS):
        picked = rng.integers(groups, size=(len(wanting), groups))
        tally = np.zeros((len(wanting), groups))
        np.add.at(tally, (np.arange(len(wanting))[:, None], picked), 1.0)
        counts[np.ix_(wanting, order)] = tally[:, group]
        wanting = wanting[(counts[wanting] > 0).sum(1) < distinct]
        again += len(wanting) if attempt < ROUNDS - 1 else 0
        if not len(wanting):
            break
    return counts, again


def _from_indices(rows: Rows, indices: np.ndarray) -> np.ndarray:
    if indices.ndim != 2 or not np.issubdtype(indices.dtype, np.integer):
        raise BadInput(
            "bootstrap", f"{indices.dtype} array of shape {indices.shape}", "must be (draws, rows) of row indices"
        )
    if indices.size and (indices.min() < 0 or indices.max() >= len(rows.position)):
        raise BadInput(
            "bootstrap", [int(indices.min()), int(indices.max())], f"indices run from 0 to {len(rows.position) - 1}"
        )
    at = rows.position[indices]
    if (at < 0).any():
        raise BadInput("bootstrap", int(indices[at < 0][0]), "names a row of the table that was left out of the fit")
    counts = np.zeros((len(indices), len(rows)))
    np.add.at(counts, (np.arange(len(indices))[:, None], at), 1.0)
    return counts
