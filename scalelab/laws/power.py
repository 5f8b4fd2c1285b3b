"""What a study can find, before it is paid for: the smallest difference between two arms, and the seeds it takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws.allocate import Cost
from scalelab.laws.fit import Fit


def detectable(
    fit: Fit,
    C: float,
    seeds: int | Sequence[int] = (1, 2, 4, 8),
    *,
    difference: float | None = None,
    shared: float = 0.0,
    power: float = 0.8,
    level: float = 0.95,
    cost: Cost = 6.0,
    **others: float,
) -> pd.DataFrame:
    """The smallest difference in compute-optimal loss at C that a study of two arms finds with probability `power`.

    Two studies, for each number of seeds s:
      by laws: both arms train this fit's design s times and the fitted laws are compared at C;
      by runs: both arms train s compute-optimal runs at C and their mean losses are compared.
    A two-sided test at `level` finds a difference of (z((1 + level)/2) + z(power)) sqrt(2 (1 - shared) / s) sigma,
    where sigma is the standard deviation of one arm's value: of L*(C) over the fit's draws, or of a run about the law.

    Args:
      difference: also give the rows of the seeds that such a difference in loss takes, as `seeds` asks otherwise.
      shared: share of the noise's variance that runs paired across arms have in common (0: unpaired, or unknown).
      cost, others: as in `Fit.optimal`.

    A DataFrame indexed by seeds: by_laws, flops_by_laws, by_runs, flops_by_runs, with differences in the unit of the
    loss and FLOPs of both arms together; with `difference`, found_by names the studies that suffice.
    """
    z = statistics.NormalDist().inv_cdf
    if not (0 < power < 1 and 0 < level < 1 and 0 <= shared < 1):
        raise BadInput("power, level, shared", (power, level, shared), "must lie between 0 and 1")
    counts = [int(s) for s in np.atleast_1d(np.asarray(seeds))]
    if not counts or min(counts) < 1:
        raise BadInput("seeds", seeds, "must be 1 or more")
    if not (np.isfinite(C) and C > 0):
        raise BadInput("C", C, "must be positive FLOPs")
    draws = fit.samples[np.isfinite(fit.samples).all(1)]
    if not fit.ok or len(draws) < 50:
        raise BadInput("fit", f"{len(draws)} draws", "needs a fit that is ok, with 50 bootstrap draws or more")
    at = fit.law.optimum(np.concatenate([fit.estimate[None], draws]), np.array([C], float), cost, **others)[2][:, 0]
    if not np.isfinite(at[0]) or np.isfinite(at).mean() < 0.5:
        raise BadInput("C", C, "the law has no interior optimum there")
    known = at[1:][np.isfinite(at[1:])]
    of_law = float(np.subtract(*np.quantile(known, [0.975, 0.025])) / (2 * z(0.975)))
    residual = fit.resid.to_numpy()
    of_run = float(np.sqrt((residual**2).sum() / max(1, fit.nobs - fit.record["free"])))
    of_run *= float(at[0]) if fit.options.objective.on == "log" else 1.0
    factor = (z((1 + level) / 2) + z(power)) * math.sqrt(2 * (1 - shared))
    needed = {}
    if difference is not None:
        if not difference > 0:
            raise BadInput("difference", difference, "must be above 0, in the unit of the loss")
        needed = {
            name: max(1, math.ceil((factor * s / difference) ** 2)) for name, s in (("laws", of_law), ("runs", of_run))
        }
        counts += needed.values()
    s = np.array(sorted(set(counts)))
    table = pd.DataFrame(
        {
            "by_laws": factor * of_law / np.sqrt(s),
            "flops_by_laws": 2 * s * float(fit.rows.compute.sum()),
            "by_runs": factor * of_run / np.sqrt(s),
            "flops_by_runs": 2 * s * float(C),
        },
        index=pd.Index(s, name="seeds"),
    )
    if needed:
        table["found_by"] = [
            " and ".join(name for name, least in needed.items() if count >= least) or "neither" for count in s
        ]
    return table
