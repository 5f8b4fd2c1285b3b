"""Bootstrap draws: which rows count how often, or what the data might have been, for each refit.

A draw is a vector of row weights and, for wild and parametric draws, a vector of data. Draws come in chunks, so that
10^5 rows and 10^4 draws never lie in memory at once, and are a function of the seed and of the rows, not of their order
in the table nor of the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws.table import Rows

METHODS = ("pairs", "wild", "parametric")
ROUNDS = 50  # attempts at drawing a resample that can be fitted at all
ELEMENTS = 1 << 20  # draws x rows in memory at once


class Resamples:
    """`draws` draws of the rows' weights (and data), by one of these methods:

    pairs: whole rows with replacement; whole clusters where the rows have them; within strata where given.
    wild: the fitted law plus its residuals with random signs, one sign for a whole cluster (Wu 1986, Liu 1988).
    parametric: the fitted law plus normal noise with the residuals' standard deviation.
    Or an array (draws, rows of the table) of row indices, taken as it is.
    """

    def __init__(
        self,
        rows: Rows,
        bootstrap: int | Int[np.ndarray, "draws table"],
        seed: int,
        distinct: int,
        method: str = "pairs",
        strata: np.ndarray | None = None,
    ):
        self.rows, self.seed, self.distinct, self.method = rows, seed, distinct, method
        if method not in METHODS:
            raise BadInput("method", method, f"must be one of {', '.join(METHODS)}")
        self.indices = None
        if isinstance(bootstrap, int | np.integer) and not isinstance(bootstrap, bool):
            self.draws = int(bootstrap)
            if self.draws < 0:
                raise BadInput(
                    "bootstrap", bootstrap, "must be 0 (none), a number of draws, or an array (draws, rows) of indices"
                )
        else:
            self.indices = _positions(rows, np.asarray(bootstrap))
            self.draws, self.method = len(self.indices), "indices"
        self.order = rows.order()
        n = len(rows)
        if rows.clusters is None:
            group = np.arange(n)
        else:  # number clusters by their first row in canonical order
            _, first, inverse = np.unique(rows.clusters[self.order], return_index=True, return_inverse=True)
            group = np.argsort(np.argsort(first))[inverse]
        self.group = group  # of the rows in canonical order
        self.groups = int(group.max()) + 1
        if self.draws and self.groups < 2 and self.indices is None:
            raise BadInput("cluster", "1 cluster", "a bootstrap over clusters needs at least 2 of them")
        if strata is None:
            self.strata = [np.arange(self.groups)]
        else:
            of_group = np.zeros(self.groups, int)
            of_group[group] = strata[self.order]
            if (of_group[group] != strata[self.order]).any():
                raise BadInput("stratify", "a cluster in two strata", "every cluster must lie within one stratum")
            self.strata = [np.flatnonzero(of_group == s) for s in np.unique(of_group)]
        self.redrawn = 0

    @property
    def name(self) -> str:
        kind = {"pairs": "pairs", "wild": "wild", "parametric": "parametric", "indices": "given row indices"}[
            self.method
        ]
        kind += " within strata" if len(self.strata) > 1 else ""
        return kind

    def chunks(
        self, fitted: Float[np.ndarray, " n"], data: Float[np.ndarray, " n"], parameters: int
    ) -> Iterator[tuple[slice, Float[np.ndarray, "k n"], Float[np.ndarray, "k n"] | None]]:
        """(which draws, their row weights, their data or None) until all are drawn.

        fitted, data: the law and the target on the objective's scale.
        """
        n = len(self.rows)
        size = max(1, ELEMENTS // n)
        rng = np.random.default_rng(self.seed)
        residual = data - fitted
        for start in range(0, self.draws, size):
            part = slice(start, min(start + size, self.draws))
            k = part.stop - part.start
            if self.indices is not None:
                yield part, _count(self.indices[part], n) * 1.0, None
            elif self.method == "pairs":
                yield part, self._pairs(rng, part), None
            else:
                if self.method == "wild":
                    sign = rng.integers(2, size=(k, self.groups))[:, self.group] * 2.0 - 1.0
                    noise = sign * residual[self.order] * np.sqrt(n / max(1, n - parameters))
                else:
                    spread = np.sqrt((residual**2).sum() / max(1, n - parameters))
                    noise = spread * rng.standard_normal((k, n))
                drawn = np.empty((k, n))
                drawn[:, self.order] = fitted[self.order] + noise
                yield part, np.ones((k, n)), drawn

    def _pairs(self, rng: np.random.Generator, part: slice) -> np.ndarray:
        counts = self._tally(rng, part.stop - part.start)
        for i in np.flatnonzero(self.wanting(counts)):
            again = np.random.default_rng([self.seed, 1, part.start + i])
            for _ in range(ROUNDS):  # too few different rows cannot be fitted: drawn again
                self.redrawn += 1
                counts[i] = self._tally(again, 1)[0]
                if not self.wanting(counts[[i]])[0]:
                    break
        return counts

    def wanting(self, counts: Float[np.ndarray, "k n"]) -> np.ndarray:
        """Which draws have too few different rows to be fitted."""
        return np.count_nonzero(counts, axis=1) < self.distinct

    def _tally(self, rng: np.random.Generator, k: int) -> np.ndarray:
        if len(self.strata) == 1:
            picked = rng.integers(self.groups, size=(k, self.groups))
        else:  # every place draws from its own stratum
            picked = np.empty((k, self.groups), int)
            uniform = rng.random((k, self.groups))
            for members in self.strata:
                picked[:, members] = members[(uniform[:, members] * len(members)).astype(int)]
        counts = np.empty((k, len(self.rows)))
        counts[:, self.order] = _count(picked, self.groups)[:, self.group]
        return counts


def _count(picked: Int[np.ndarray, "k m"], size: int) -> Int[np.ndarray, "k size"]:
    """How often each row of `picked` names each of 0, ..., size - 1."""
    flat = picked + size * np.arange(len(picked))[:, None]
    return np.bincount(flat.ravel(), minlength=len(picked) * size).reshape(len(picked), size)


def _positions(rows: Rows, indices: np.ndarray) -> np.ndarray:
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
    return at
