"""Fits of one law to several arms with shared parameters, and the test whether sharing them is rejected.

What arms have in common (the floor E of a data set, the exponent of data) is learned from all their runs: the strongest
single means to extrapolate a *difference* between arms. Whether they do have it in common is put to a test.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws import objective as objectives
from scalelab.laws.fit import Fit, Options
from scalelab.laws.joint import Joint
from scalelab.laws.law import STARTS, Law
from scalelab.laws.notices import Notice
from scalelab.laws.objective import Objective
from scalelab.laws.paired import units
from scalelab.laws.resample import ELEMENTS
from scalelab.laws.shown import Notices, worst_first
from scalelab.laws.simulate import named
from scalelab.laws.solver import minimise
from scalelab.laws.table import Rows, Table

TEST_DRAWS = 400  # of the sharing test


def fit_shared(
    tables: Mapping[str, Table],
    law: str | Law = "chinchilla",
    shared: Sequence[str] = ("E", "B", "beta"),
    *,
    pair: str | Sequence[str] | None = None,
    bootstrap: int = 1000,
    cluster: str | None = "auto",
    columns: Mapping[str, str] | None = None,
    method: str = "pairs",
    seed: int = 0,
    objective: str | Objective | None = None,
    delta: float | str | None = None,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    starts: int | None = None,
    drop: bool = False,
) -> SharedFit:
    """One regression of a law on several arms: parameters in `shared` are one number for all, the others one per arm.

    Args:
      tables: arm -> its table of runs.
      shared: parameters of the law. () is a separate fit of each arm, from common draws where `pair` is given.
      pair: column, or columns, whose equal values mark runs of different arms as each other's counterpart; they are
        resampled together. None: every arm's rows (or clusters) are resampled by themselves.
      fixed, tied: hold within every arm. Everything else as in `Law.fit`.

    Raises `BadInput` for what cannot be fitted, and for parameters that a form cannot share.
    """
    law = named(law)
    if len(tables) < 2:
        raise BadInput("tables", list(tables), "sharing needs two arms or more")
    frame, clustered = stack(tables, pair, cluster, columns)
    joint = Joint(law, list(tables))
    goal = objectives.parse(objective, law.objective, delta)
    within = {"fixed": dict(fixed or {}), "tied": dict(tied or {})}
    first = law.fit(
        frame, columns=columns, bootstrap=0, cluster=None, seed=seed, objective=goal, drop=drop, **within
    )  # what the form itself makes of its options, on all rows
    goal, within["fixed"] = first.options.objective, first.options.fixed
    fixed_in_all, ties = joint.ties(shared, within["fixed"], within["tied"])
    fit = joint.fit(
        frame, columns=columns, bootstrap=bootstrap, cluster="unit" if clustered else None, method=method,
        stratify="stratum", seed=seed, objective=goal, fixed=fixed_in_all, tied=ties, starts=starts or STARTS,
        drop=drop,
    )  # fmt: skip
    about = {"shared": list(shared), "within": within, "pair": None if pair is None else _text(pair)}
    return SharedFit(fit, about)


def stack(
    tables: Mapping[str, Table],
    pair: str | Sequence[str] | None,
    cluster: str | None,
    columns: Mapping[str, str] | None,
) -> tuple[pd.DataFrame, bool]:
    """All arms in one table, with columns `arm`, `unit` and `stratum`; and whether any unit has several rows."""
    named_by = dict(columns or {})
    frames, labels = [], []
    for arm, table in tables.items():
        frame = pd.DataFrame(table).copy()
        if not len(frame):
            raise BadInput(f"tables[{arm}]", "0 rows", "has nothing to fit")
        column = cluster
        if cluster == "auto":
            possible = [named_by.get(role, role) for role in ("run", "id")]
            column = next((c for c in possible if c in frame and frame[c].duplicated().any()), None)
        for field, names in (("cluster", [column] if column else []), ("pair", _names(pair))):
            for name in names:
                if name not in frame:
                    raise BadInput(field, name, f"no such column in arm {arm}; it has {', '.join(map(str, frame))}")
        labels += [str(v) for v in (frame[column] if column else range(len(frame)))]
        frames.append(frame.assign(arm=str(arm)).set_axis([f"{arm}:{i}" for i in frame.index], axis=0))
    whole = pd.concat(frames)
    keys = None if pair is None else list(whole[_names(pair)].itertuples(index=False, name=None))
    code = np.repeat(np.arange(len(frames)), [len(f) for f in frames])
    drawn = units(code, keys, labels)
    if pair is not None and drawn.matched < 2:
        raise BadInput(
            "pair", _text(pair), f"{drawn.matched} of its values have runs in every arm; pairing needs 2 or more"
        )
    return whole.assign(unit=drawn.unit, stratum=drawn.stratum), drawn.grouped


def _names(pair: str | Sequence[str] | None) -> list[str]:
    return [] if pair is None else [pair] if isinstance(pair, str) else list(pair)


def _text(pair: str | Sequence[str]) -> str:
    return ", ".join(_names(pair))


class SharedFit(Fit):
    """A law fitted to several arms at once. `params` names each arm's parameters `A[arm]`; shared ones are equal.

    `arm(name)` is that arm's part as a fit of its own (predict, optimal, ... with intervals); `sharing()` is the test
    whether sharing is rejected.
    """

    kind = "shared"
    law: Joint

    def __init__(self, fit: Fit, about: Mapping[str, Any] | None = None):
        record = {**fit.record, **(about or {})}
        super().__init__(
            fit.law, fit.rows, fit.options, fit.estimate, fit.samples, fit._notices, record, fit._solved
        )  # fmt: skip
        free = self.record["shared"]
        first = self.law.split(self.estimate[None], 0)[0]
        for k in range(1, len(self.arms)):
            for name, a, b in zip(
                self.law.base.parameters, first, self.law.split(self.estimate[None], k)[0], strict=True
            ):
                if name in free and not np.isclose(a, b, rtol=1e-6):
                    raise BadInput("shared", name, f"{self.law.name} is fitted in coordinates in which it has no tie")

    @property
    def arms(self) -> tuple[str, ...]:
        return self.law.arms

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(self.record["shared"])

    def arm(self, name: str) -> ArmFit:
        """An arm's part of the fit."""
        if name not in self.arms:
            raise BadInput("arm", name, f"must be one of {', '.join(self.arms)}")
        return ArmFit(self, name)

    def refit(self, rows=None, *, objective=None, bootstrap=0):
        fit = super().refit(rows, objective=objective, bootstrap=bootstrap)
        return SharedFit(fit, {k: self.record[k] for k in ("shared", "within", "pair")})

    @property
    def _free(self) -> Options:
        """The options of the fit in which nothing is shared."""
        within = self.record["within"]
        fixed, ties = self.law.ties((), within["fixed"], within["tied"])
        return self.options.replace(fixed=fixed, tied=ties)

    def sharing(self, draws: int = TEST_DRAWS, seed: int = 0) -> pd.Series:
        """Test of the hypothesis that the shared parameters are equal in all arms.

        The statistic is F = ((V_shared - V_free) / q) / (V_free / (n - P)): the rise of the objective V per
        constraint, over the mean objective that the free fit of P parameters leaves. Its null distribution is not
        taken from a table, which would hold for least squares only, but from `draws` data sets in which sharing is
        true, each fitted both ways: the shared fit plus normal noise as strong, and as alike within a pair or cluster,
        as the free fit's residuals. p = (1 + number of F* >= F) / (1 + draws). (Not those residuals themselves, with
        random signs or redrawn: an objective like Huber's leaves P of them at zero, and short sweeps then reject far
        too often.)

        A Series: statistic, p_value, p_value_mc (its Monte-Carlo error), constraints, draws. A small p rejects sharing;
        a large one does not prove it, see the arms' own estimates.
        """
        return self._sharing(draws, seed)

    @functools.lru_cache(maxsize=4)  # noqa: B019  a handful of numbers, as long as the fit
    def _sharing(self, draws: int, seed: int) -> pd.Series:
        law, rows, goal = self.law, self.rows, self.options.objective
        constraints = (len(self.arms) - 1) * len(set(self.shared) - set(self.record["within"]["fixed"]))
        if not constraints:
            raise BadInput("shared", list(self.shared), "nothing is shared: there is nothing to test")
        free_options = self._free
        separate = [self._alone(k) for k in range(len(self.arms))]
        start = np.concatenate([fit.estimate for fit in separate])
        P = len(law.parameters) - len(free_options.fixed) - len(free_options.tied)
        n = len(rows)
        problem, theta = self.solved
        free = law._regression(rows, free_options)
        own = free.internal(start[None])
        own = np.where(np.isfinite(own), own, 0.0)
        weights = rows.weights
        best = minimise(free, np.concatenate([own, free.internal(self.estimate[None])]), weights, goal)
        at = best.theta[best.value.argmin()]
        floor = 0.5 * weights.sum() * (1e-12 * max(1.0, float(np.abs(problem.data).max()))) ** 2  # rounding

        def statistic(shared: np.ndarray, loose: np.ndarray) -> np.ndarray:
            rise = (np.maximum(shared - loose, 0.0) / constraints) / ((loose + floor) / max(1, n - P))
            return np.where(rise < 1e-6, 0.0, rise)  # of an exact fit: where two searches stopped, no evidence

        observed = float(statistic(np.array(self.record["value"]), best.value.min()))
        residual = problem.data - free.model(at[None])[0]
        fitted = problem.model(theta[None])[0]
        truth = free.internal(self.estimate[None])[0]
        null = []
        for noise in _alike(residual, free.jacobian(at), rows, draws, seed):
            data, lanes = fitted + noise, len(noise)
            tied = minimise(problem, np.tile(theta, (lanes, 1)), weights, goal, data=data)
            loose = [minimise(free, np.tile(x, (lanes, 1)), weights, goal, data=data).value for x in (truth, at)]
            null.append(statistic(tied.value, np.minimum(np.minimum(*loose), tied.value)))
        p = (1 + int((np.concatenate(null) >= observed).sum())) / (1 + draws)
        return pd.Series(
            {
                "statistic": observed,
                "p_value": p,
                "p_value_mc": float(np.sqrt(p * (1 - p) / draws)),
                "constraints": constraints,
                "draws": draws,
            },
            name=f"sharing of {', '.join(self.shared)}",
        )

    def _alone(self, k: int) -> Fit:
        """An arm fitted by itself, with the same options."""
        within = self.record["within"]
        mine = self.rows.columns["arm"] == k
        options = self.options.replace(fixed=within["fixed"], tied=within["tied"])
        return self.law.base.fit_rows(self.rows.take(mine), options, 0, near=self.law.split(self.estimate[None], k)[0])

    @property
    def warnings(self) -> Notices:
        """All findings, with that of the sharing test, worst first."""
        if not self._studied and self.converged and self.shared:
            test = self.sharing()
            if test.p_value < 0.05:
                self.add(
                    Notice(
                        "sharing-rejected",
                        "warning",
                        f"{', '.join(self.shared)} are not the same in all arms: F = {test.statistic:.3g} of "
                        f"{test.constraints:.0f} constraints, p = {test.p_value:.3g}.",
                        "share fewer parameters, or compare separate fits.",
                        {str(k): float(v) for k, v in test.items()},
                    )
                )
        return super().warnings

    def parameter_lines(self, level: float = 0.95) -> list[str]:
        """A shared parameter once, the others once per arm."""
        lines = super().parameter_lines(level)
        tied = set(self.options.tied)
        kept = [line for line in lines[1:] if line.split(maxsplit=1)[0] not in tied]
        names = {f"{name}[{self.arms[0]}]": name for name in self.shared}
        for i, line in enumerate(kept):
            label = line.split(maxsplit=1)[0]
            if label in names:
                kept[i] = line.replace(label, names[label].rjust(len(label)), 1)
        return [lines[0], *kept]

    def summary(self, level: float = 0.95) -> str:
        text = super().summary(level)
        tied = [f"tied: {name} = {other}" for name, other in self.options.tied.items()]
        lines = [line for line in text.split("\n") if line not in tied]
        if self.shared:
            test = self.sharing()
            lines.insert(
                3,
                f"shared by all arms: {', '.join(self.shared)}; test of sharing: F = {test.statistic:.3g}, "
                f"p = {test.p_value:.3g} +- {test.p_value_mc:.2g} ({test.draws:.0f} draws under sharing)",
            )
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        return super().document() | {"arms": list(self.arms)}


def _alike(residual: np.ndarray, jacobian: np.ndarray, rows: Rows, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (k, n) of normal noise: a variance of each row's own, and one that the rows of a cluster have in common.

    The two are those whose expected sums of squares, over rows and of cluster totals, are the residuals': the fit has
    taken its share of both out of them (least squares' share: r = M noise with M = 1 - J (J'J)^-1 J').
    """
    order, n = rows.order(), len(residual)
    r, J = residual[order], jacobian[order]
    group = np.arange(n) if rows.clusters is None else pd.factorize(rows.clusters[order])[0]
    size, total = np.bincount(group), np.bincount(group, r)
    left = max(1, n - J.shape[1])
    own, common = float(r @ r) / left, 0.0
    if (size > 1).any():
        sums = np.zeros((len(size), J.shape[1]))
        np.add.at(sums, group, J)
        K = np.linalg.pinv(J.T @ J, hermitian=True)
        S = sums.T @ sums
        once = n - np.trace(K @ S)
        twice = (size**2).sum() - 2 * np.einsum("c,ci,ij,cj->", size, sums, K, sums) + np.trace(K @ S @ K @ S)
        own, common = np.linalg.lstsq(np.array([[left, once], [once, twice]]), [r @ r, total @ total], rcond=None)[0]
        if own < 0 or common < 0:  # one of the two explains it all
            own, common = (0.0, float(total @ total) / twice) if own < 0 else (float(r @ r) / left, 0.0)
    rng = np.random.default_rng(seed)
    chunk = max(1, ELEMENTS // n)
    for first in range(0, draws, chunk):
        k = min(chunk, draws - first)
        noise = np.empty((k, n))
        each, shared = rng.standard_normal((k, n)), rng.standard_normal((k, len(size)))[:, group]
        noise[:, order] = np.sqrt(own) * each + np.sqrt(common) * shared
        yield noise


class ArmFit(Fit):
    """One arm of a shared fit: the form's parameters, with the draws of the joint fit."""

    def __init__(self, whole: SharedFit, name: str):
        joint, k = whole.law, whole.arms.index(name)
        rows = whole.rows.take(whole.rows.columns["arm"] == k)
        within = whole.record["within"]
        share = len(rows) / len(whole.rows)
        record = whole.record | {
            "law": joint.base.name,
            "equation": joint.base.equation,
            "rows": len(rows),
            "rows_in_table": len(rows),
            "free": max(1, round(whole.record["free"] * share)),
            "arm": name,
        }
        super().__init__(
            joint.base, rows, whole.options.replace(fixed=within["fixed"], tied=within["tied"]),
            joint.split(whole.estimate[None], k)[0], joint.split(whole.samples, k), [], record,
        )  # fmt: skip
        self.whole, self.name, self._index = whole, name, k
        self._examined, self._studied = False, True

    @property
    def notices(self) -> list[Notice]:
        """The joint fit's, and what only this form can have wrong with it."""
        if not self._examined:
            self._examined = True
            for notice in self.law.findings(self):
                self.add(notice)
        return [*self.whole.notices, *self._notices]

    @property
    def warnings(self) -> Notices:
        known = self.notices[len(self.whole.notices) :]
        return worst_first([*self.whole.warnings, *known])

    def holdout(self, cut=None):
        """The joint fit's: the largest runs of all arms held out together."""
        return self.whole.holdout(cut)

    def refit(self, rows: Rows | None = None, *, objective=None, bootstrap=0) -> Fit:
        """The joint fit with other rows in this arm's place."""
        raise BadInput("refit", self.name, "an arm of a shared fit is refitted with the others: fit.whole.refit()")
