"""What is resampled together across arms: runs that share a key, and the clusters that they belong to.

A key (a seed, a data order, an (N, D) point, a run id) says which runs of different arms are each other's counterpart.
Whatever these have in common (the noise of a seed, an awkward batch, a point where the form misfits) then enters every
draw on both sides and leaves their difference: the interval of a comparison narrows, rightly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws.resample import Resamples
from scalelab.laws.table import Rows


@dataclasses.dataclass(frozen=True)
class Units:
    """Per row of all arms, one after the other: the unit that is drawn whole, and the stratum it is drawn within.

    A stratum is the set of arms that a unit has rows in, so that every draw has as many pairs, and as many runs
    without a counterpart, as the data. `matched`: the number of units with rows in every arm.
    """

    unit: np.ndarray
    stratum: np.ndarray
    matched: int

    @property
    def grouped(self) -> bool:
        return len(np.unique(self.unit)) < len(self.unit)


def units(arm: np.ndarray, keys: Sequence[object] | None, clusters: Sequence[object]) -> Units:
    """The units of rows from their arm, their key across arms (None: not paired) and their cluster within an arm.

    Rows of one key are drawn together, and so are rows of one cluster: units are the connected components.
    """
    own = pd.factorize(pd.Series(list(zip(arm.tolist(), map(str, clusters), strict=True))))[0]
    unit = own.copy()
    if keys is not None:
        shared = pd.factorize(pd.Series([str(k) for k in keys]))[0]
        while True:
            before = unit.copy()
            for label in (shared, own):
                lowest = np.full(label.max() + 1, len(label))
                np.minimum.at(lowest, label, unit)
                unit = lowest[label]
            if (unit == before).all():
                break
    unit = pd.factorize(unit)[0]
    arms = int(arm.max()) + 1
    held = np.zeros((int(unit.max()) + 1, arms), bool)
    held[unit, arm] = True
    stratum = (held * 2 ** np.arange(arms)).sum(1)[unit]
    return Units(unit, stratum, int(held.all(1).sum()))


def pool(rows: Sequence[Rows], units: Units, cluster: str) -> Rows:
    """The arms' rows one after the other: what the resamples of all arms are drawn from."""
    roles = [role for role in rows[0].keys if all(role in r.columns for r in rows)]
    columns = {role: np.concatenate([np.asarray(r.columns[role], float) for r in rows]) for role in roles}
    columns["arm"] = np.repeat(np.arange(len(rows), dtype=float), [len(r) for r in rows])
    n = len(columns["arm"])
    return Rows(
        columns, pd.RangeIndex(n), [name for r in rows for name in r.names], np.concatenate([r.weights for r in rows]),
        units.unit, np.arange(n), keys=("arm", *roles), cluster=cluster, strata=units.stratum,
    )  # fmt: skip


class PairedResamples(Resamples):
    """One arm's share of draws made for all arms at once; every arm's view gives the same draws."""

    def __init__(self, pooled: Rows, arm: int, draws: int, seed: int, need: Sequence[int]):
        super().__init__(pooled, draws, seed, 0, "pairs", pooled.strata)
        self.need = need
        self.members = [np.flatnonzero(pooled.columns["arm"] == k) for k in range(len(need))]
        self.mine = self.members[arm]

    @property
    def name(self) -> str:
        return "pairs, the same in all arms"

    def wanting(self, counts):
        short = [(counts[:, rows] > 0).sum(1) < need for rows, need in zip(self.members, self.need, strict=True)]
        return np.any(short, axis=0)

    def chunks(self, fitted, data, parameters) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
        level = np.zeros(len(self.rows))  # draws of rows need neither the law nor the data
        for part, counts, _ in super().chunks(level, level, 0):
            yield part, counts[:, self.mine], None


def resamples(rows: Sequence[Rows], units: Units, name: str, draws: int, seed: int, need: Sequence[int]) -> list:
    """`PairedResamples` for each arm."""
    if units.matched < 2:
        raise BadInput("pair", name, f"{units.matched} of its values have runs in every arm; pairing needs 2 or more")
    pooled = pool(rows, units, name)
    return [PairedResamples(pooled, k, draws, seed, need) for k in range(len(rows))]
