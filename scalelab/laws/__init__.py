"""Scaling laws: fit them to any table, with intervals, held-out error and findings.

    from scalelab import laws
    fit = laws.fit("chinchilla", laws.read_table("runs.csv"), columns={"params": "N", "tokens": "D", "loss": "L"})
    print(fit.summary())
    fit.optimal(1e21)

NumPy and pandas only: no JAX, no model, no plot is imported before it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from scalelab.errors import BadInput
from scalelab.laws import forms, store
from scalelab.laws.allocate import flops_per_token
from scalelab.laws.compare import compare
from scalelab.laws.comparison import Comparison
from scalelab.laws.curves import curve_features
from scalelab.laws.envelope import EnvelopeFit, envelope
from scalelab.laws.fit import Fit
from scalelab.laws.forms import *  # noqa: F403  every form by its class, and the functions that belong to one
from scalelab.laws.hyperparameters import excess_loss, step_law
from scalelab.laws.isoflop import IsoflopFit, isoflop
from scalelab.laws.law import Law, define
from scalelab.laws.notices import Notice
from scalelab.laws.objective import Objective
from scalelab.laws.optimum import lr_optimum
from scalelab.laws.parameter import Parameter, free, negative, positive
from scalelab.laws.passk import BetaTail, beta_tail, coverage_table, pass_at_k
from scalelab.laws.plan import Plan, plan
from scalelab.laws.posterior import Posterior, posterior
from scalelab.laws.power import detectable
from scalelab.laws.rank import Ranking
from scalelab.laws.rank import rank as _rank
from scalelab.laws.shared import SharedFit, fit_shared
from scalelab.laws.simulate import simulate
from scalelab.laws.table import Table, read_table
from scalelab.laws.validate import Holdout, budgets

LAWS: dict[str, type[Law]] = {law.name: law for law in forms.ALL}

__all__ = [
    "BetaTail",
    "Comparison",
    "EnvelopeFit",
    "Fit",
    "Holdout",
    "IsoflopFit",
    "Law",
    "Notice",
    "Objective",
    "Parameter",
    "Plan",
    "Posterior",
    "Ranking",
    "SharedFit",
    "available",
    "beta_tail",
    "budgets",
    "compare",
    "coverage_table",
    "curve_features",
    "define",
    "detectable",
    "envelope",
    "excess_loss",
    "fit",
    "fit_shared",
    "flops_per_token",
    "free",
    "isoflop",
    "load",
    "lr_optimum",
    "negative",
    "pass_at_k",
    "plan",
    "positive",
    "posterior",
    "rank",
    "read_table",
    "simulate",
    "step_law",
]
__all__ += forms.__all__


def available() -> list[str]:
    """The names that `fit` knows."""
    return sorted(LAWS)


def fit(law: str | Law, table: Table, **options: Any) -> Fit:
    """Fit a law, by name or as an object, to a table of runs. Options as in `Law.fit`."""
    if isinstance(law, str):
        if law not in LAWS:
            raise BadInput("law", law, f"must be one of {', '.join(available())}")
        law = LAWS[law]()
    return law.fit(table, **options)


def rank(table: Table, forms: Sequence[str | Law], *, cut: float | None = None, **options: Any) -> Ranking:
    """Fit several laws to the same runs and rank them by their error on the runs of at least `cut` FLOPs.

    Forms whose difference noise alone could make are tied; the noise is that between seeds of the same inputs, or,
    with a note `seed-noise-unknown`, the residuals' scatter. Options as in `Law.fit`; no bootstrap by default. Raises
    `BadInput` where the forms do not predict the same target of the same rows.
    """
    return _rank(table, forms, cut=cut, known=LAWS, **options)


def load(path: str | os.PathLike[str], law: Law | None = None) -> Any:
    """A `Fit` (`IsoflopFit`, ...) from the file that its `save` wrote, bit for bit. `law`: your own, if it is one."""
    return store.load(path, LAWS, law)
