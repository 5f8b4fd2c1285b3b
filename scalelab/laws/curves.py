"""Loss curves: what laws of a whole curve need to know of the learning rates up to each of its points.

Such laws sum over all past changes of the learning rate. For each row of a table the changes are gathered into blocks
that are single steps near the row and grow with the distance from it (a dyadic tree, as in the fast multipole
method), and each block stands for two changes: mean plus and minus one standard deviation, the two-point rule of
Gauss. A sum over 70,000 steps thereby becomes one of at most `NODES` terms. Losses differ from those of the sum over
steps by under 3e-5 for schedules that decay, and by some 5e-4 for rates that go up and down many times. Every row
carries its own history, so rows can be left out, resampled and stored like those of any law.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws.table import Table, _numbers, frame_of

NODES = 96  # the most changes that a row's history is gathered into
LONGEST = 1 << 20  # steps of a curve: what NODES are enough for
ROWS = 1 << 12  # rows worked on at once
MOST = 1 << 18  # rows in all, whose features take 0.8 GB

LR_SUM = "lr_sum"
DROP, RATE, SINCE, AGE = (
    tuple(f"{name}_{j:02d}" for j in range(NODES)) for name in ("lr_drop", "lr_then", "lr_since", "lr_age")
)


def curve_features(table: Table, columns: Mapping[str, str] | None = None, target: str | None = None) -> pd.DataFrame:
    """The table with the columns that laws of a whole loss curve take.

    Args:
      table: a row per point of a curve, with `schedule` (a label, one per curve), `step` (count, from 0) and `lr` (the
        rate of that step). Between the rows of a curve the rate is linear in the step, and before the first row it
        rises linearly from 0 at step 0. Where that is not so, add rows that have no loss (NaN): the end of the
        warm-up, the two steps on either side of a jump, or simply all steps.
      columns: role -> column, as in `laws.fit`.
      target: leave out rows where this column is NaN, whose history still counts.

    The laws call this themselves; call it first to pick rows afterwards, for every row that comes back carries its
    history, while a table without its early rows has lost it.

    Adds, for each row: `lr_sum`, S1 = the sum of the rates up to and including its step, and up to `NODES` changes of
    the rate before it: `lr_drop_j` (by how much it fell; negative where it rose), `lr_then_j` (the rate after the
    change), `lr_since_j` (the sum of the rates since then, that step included), `lr_age_j` (the steps since then, that
    one included; 0 for the rise of the warm-up). A column `run` is added where there is none, so that a curve's points
    are one cluster.

    Raises `BadInput` for rates below 0, steps that are no counts, two rows of a curve at one step, curves of more than
    1,048,576 steps, and more than 262,144 rows wanted.
    """
    frame = frame_of(table)
    names = {role: (columns or {}).get(role, role) for role in ("schedule", "step", "lr")}
    for role, column in names.items():
        if column not in frame:
            remedy = f"a loss curve needs {role}; name yours: columns={{'{role}': ...}}"
            raise BadInput("table", list(frame.columns), remedy)
    step, lr = (_numbers(frame, names[role], required=True) for role in ("step", "lr"))
    if (bad := ~((step >= 0) & (step == np.floor(step)))).any():
        raise BadInput(f"column {names['step']}", step[bad][:5].tolist(), "must hold counts of steps, 0 or more")
    if (bad := ~((lr >= 0) & np.isfinite(lr))).any():
        raise BadInput(f"column {names['lr']}", lr[bad][:5].tolist(), "must hold finite learning rates, 0 or more")
    wanted = np.ones(len(frame), bool)
    if target is not None:
        column = (columns or {}).get(target, target)
        if column in frame:
            wanted = frame[column].notna().to_numpy()
    if wanted.sum() > MOST:
        remedy = f"at most {MOST} may have features: leave rows out, or give most no {target or 'loss'}"
        raise BadInput("table", f"{int(wanted.sum())} rows", remedy)
    values = np.empty((int(wanted.sum()), 1 + 4 * NODES))
    place = np.cumsum(wanted) - 1
    curve = pd.factorize(frame[names["schedule"]])[0]
    if (curve < 0).any():
        raise BadInput(f"column {names['schedule']}", None, "names no curve in some row")
    for c in range(curve.max() + 1):
        rows = np.flatnonzero(curve == c)
        label = frame[names["schedule"]].iloc[rows[0]]
        order = rows[np.argsort(step[rows], kind="stable")]
        at = step[order].astype(int)
        if (np.diff(at) == 0).any():
            twice = int(at[:-1][np.diff(at) == 0][0])
            remedy = f"has two rows at step {twice}; give each curve a label of its own"
            raise BadInput(f"column {names['schedule']}", str(label), remedy)
        if at[-1] >= LONGEST:
            raise BadInput(f"column {names['step']}", int(at[-1]), f"curves may have up to {LONGEST} steps")
        history = History.of(_every_step(at, lr[order]))
        mine = rows[wanted[rows]]
        for i in range(0, len(mine), ROWS):
            part = mine[i : i + ROWS]
            values[place[part]] = history.at(step[part].astype(int))
    features = pd.DataFrame(values, columns=[LR_SUM, *DROP, *RATE, *SINCE, *AGE], index=frame.index[wanted])
    clash = [column for column in features if column in frame]
    kept = frame.loc[wanted].drop(columns=clash)
    if "run" not in kept and "id" not in kept:
        kept = kept.assign(run=kept[names["schedule"]])
    return pd.concat([kept, features], axis=1)


def _every_step(at: Int[np.ndarray, " n"], lr: Float[np.ndarray, " n"]) -> Float[np.ndarray, " T"]:
    """The rate of every step from 0 to the last one given."""
    if at[0] > 0:
        at, lr = np.concatenate([[0], at]), np.concatenate([[0.0], lr])
    return np.interp(np.arange(at[-1] + 1), at, lr)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of 2^l neighbouring steps: total change, and mean, variance and covariance (with the first) of (sum of
    the rates before the change, rate after it, step), weighted by the change."""

    weight: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, "3 n"]
    spread: Float[np.ndarray, "3 n"]
    together: Float[np.ndarray, "3 n"]

    def doubled(self) -> _Blocks:
        """Neighbours joined (the pairwise update of Chan, Golub & LeVeque, which loses no digits)."""
        if len(self.weight) % 2:
            parts = (np.concatenate([a, np.zeros((*a.shape[:-1], 1))], axis=-1) for a in dataclasses.astuple(self))
            return _Blocks(*parts).doubled()
        (wl, wr), (ml, mr), (sl, sr), (tl, tr) = ((a[..., ::2], a[..., 1::2]) for a in dataclasses.astuple(self))
        weight = wl + wr
        share = np.divide(wr, weight, out=np.zeros_like(wr), where=weight > 0)
        apart = mr - ml
        mixing = share * (1 - share)
        mean = ml + share * apart
        spread = (1 - share) * sl + share * sr + mixing * apart**2
        together = (1 - share) * tl + share * tr + mixing * apart * apart[0]
        return _Blocks(weight, mean, spread, together)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """One kind of change of the rate, in blocks of 1, 2, 4, ... steps."""

    sign: float  # of the drop
    aging: bool  # whether the annealing law counts it
    levels: tuple[_Blocks, ...]

    def nodes(
        self, level: int, block: Int[np.ndarray, " n"], total: Float[np.ndarray, " n"], steps: Int[np.ndarray, " n"],
        parts: tuple[int, ...],
    ) -> list[Float[np.ndarray, "4 n"]]:  # fmt: skip
        """drop, rate, since, age for each row's block of this level (-1: none), as seen from its step and S1."""
        blocks = self.levels[level]
        weight = np.where(block >= 0, blocks.weight[block], 0.0)
        if not weight.any():
            return []
        mean, spread, toward = blocks.mean[:, block], np.sqrt(blocks.spread[:, block]), blocks.together[:, block]
        if not spread.any():
            parts = (0,)
        out = []
        if not self.aging and level and (first := block == 0).any():  # toward step 0 the rate's logarithm runs away
            for below in range(level):
                out += self.nodes(below, np.where(first, 1, -1), total, steps, parts)
            weight = np.where(first, 0.0, weight)
        for part in parts:
            before, rate, at = mean + part * np.sign(toward) * spread
            since = np.maximum(total - before, 0.0)
            age = np.maximum(steps + 1 - at, 0.0) if self.aging else np.zeros_like(at)
            out.append(np.stack([self.sign * weight / len(parts), np.maximum(rate, 0.05 * mean[1]), since, age]))
        return out


@dataclasses.dataclass(frozen=True)
class History:
    """The rates of one curve and all their changes."""

    total: Float[np.ndarray, " T"]  # sum of the rates up to and including each step
    changes: tuple[_Changes, ...]  # falls, rises of the warm-up, later rises

    @classmethod
    def of(cls, lr: Float[np.ndarray, " T"]) -> History:
        """From the rate of every step, 0 to T - 1."""
        total = np.cumsum(lr)
        drop = np.concatenate([[0.0], lr[:-1] - lr[1:]])
        level = np.flatnonzero(drop[1:] >= 0)
        warming = np.arange(len(lr)) <= (level[0] if len(level) else len(lr))
        points = np.stack([total - lr, lr, np.arange(len(lr), dtype=float)])
        changes = []
        for sign, aging, which in (
            (1.0, True, drop > 0),
            (-1.0, False, (drop < 0) & warming),
            (-1.0, True, (drop < 0) & ~warming),
        ):
            weight = np.where(which, np.abs(drop), 0.0)
            if not which.any():
                continue
            blocks = [_Blocks(weight, points, np.zeros_like(points), np.zeros_like(points))]
            while len(blocks[-1].weight) > 1:
                blocks.append(blocks[-1].doubled())
            changes.append(_Changes(sign, aging, tuple(blocks)))
        return cls(total, tuple(changes))

    def at(self, steps: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n features"]:
        """S1 and the nodes (drop, rate, since, age) of each of these steps."""
        nodes = self._nodes(steps, (-1, 1))
        full = (nodes[0] != 0).sum(1) > NODES
        packed = _packed(nodes)
        if full.any():  # a rate that goes up and down all the time: one node for a block
            packed[:, full] = _packed(self._nodes(steps[full], (0,)))
        return np.concatenate([self.total[steps][:, None], *packed], axis=1)

    def _nodes(self, steps: Int[np.ndarray, " n"], parts: tuple[int, ...]) -> Float[np.ndarray, "4 n m"]:
        """drop, rate, since, age of the nodes of all blocks, empty ones (drop 0) among them.

        parts: a block's nodes, in standard deviations from its mean.
        """
        out = [np.zeros((4, len(steps)))]
        end = steps + 1  # steps from here on are covered
        for level in range(max((len(kind.levels) for kind in self.changes), default=0)):
            for again in (False, True):  # one block, and another where that leaves an odd number of them
                block = (end >> level) - 1
                taken = (end > 0) & ((block % 2 == 0) | (not again))
                for kind in self.changes:
                    out += kind.nodes(level, np.where(taken, block, -1), self.total[steps], steps, parts)
                end = np.where(taken, block << level, end)
        return np.stack(out, axis=2)


def _packed(nodes: Float[np.ndarray, "4 n m"]) -> Float[np.ndarray, "4 n NODES"]:
    """The first NODES nodes that hold a change, then zeros."""
    empty = nodes[0] == 0
    order = np.argsort(empty, axis=1, kind="stable")[:, :NODES]
    moved = np.take_along_axis(np.where(empty, 0.0, nodes), order[None], axis=2)
    return np.pad(moved, ((0, 0), (0, 0), (0, NODES - moved.shape[2])))
