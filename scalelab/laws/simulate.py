"""Tables drawn from a law: for power studies, for planning, and for tests of the tool itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.fit import Fit
from scalelab.laws.forms import ALL
from scalelab.laws.table import Table

if TYPE_CHECKING:
    from scalelab.laws.law import Law


def named(law: str | Law) -> Law:
    """A law by its name, or the law itself."""
    if not isinstance(law, str):
        return law
    known = {form.name: form for form in ALL}
    if law not in known:
        raise BadInput("law", law, f"must be one of {', '.join(sorted(known))}")
    return known[law]()


def simulate(
    law: str | Law | Fit,
    design: Table,
    noise: float | None = None,
    seed: int = 0,
    *,
    params: str | Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The design's table with its target drawn from a law: what such runs would give, were the law true.

    Args:
      law: a fit (its estimate is the truth), or a law, by name or as an object, with `params`.
      design: the law's inputs, a row per run. Other columns come through; an existing target is replaced.
      noise: standard deviation of normal noise, of the target's logarithm (0.005: half a per cent) or, for a law whose
        objective takes values, of the target. 0: none. None: a fit's own residuals, see `residual_noise`.
      params: constants of the law: parameter -> value, or a name in its `published`.

    Same seed, same design: same table. Raises `BadInput` for what cannot be drawn.
    """
    if noise is not None and not (np.isfinite(noise) and noise >= 0):
        raise BadInput("noise", noise, "must be a standard deviation, 0 or more")
    rng = np.random.default_rng(seed)
    if isinstance(law, Fit):
        if params is not None:
            raise BadInput("params", params, "a fit brings its own; give its law to use others: fit.law")
        fit, law = law, law.law
        columns, index = fit._inputs(design)
        value = pd.Series(law.evaluate(fit.estimate[None], columns)[0], index=index)
        on = fit.options.objective.on
        spread = residual_noise(fit, (len(value),), rng) if noise is None else noise * rng.standard_normal(len(value))
    else:
        law = named(law)
        if params is None or noise is None:
            missing = "params" if params is None else "noise"
            raise BadInput(missing, None, f"a law without data needs it; {missing} may be left out for a fit only")
        value = law.predict(params, design)
        on = law.objective.on
        spread = noise * rng.standard_normal(len(value))
    drawn: Any = value * np.exp(spread) if on == "log" else value + spread
    if not np.isfinite(drawn).all():
        raise BadInput("design", drawn[~np.isfinite(drawn)].index[:5].tolist(), f"{law.name} has no finite value there")
    table = pd.DataFrame(design) if not isinstance(design, pd.DataFrame) else design
    return table.assign(**{law.target: drawn.to_numpy()})


def residual_noise(fit: Fit, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
    """Noise as a fit's rows have it, on its objective's scale: residuals about their median, drawn with replacement.

    The P smallest, of P fitted parameters, take no part: an objective like Huber's leaves P residuals at zero, and
    noise with such a spike would seem easier to fit than it is. The others are scaled to the variance
    sum r^2 / (n - P).
    """
    residual = fit.resid.to_numpy()
    residual = residual - np.median(residual)
    n, P = len(residual), fit.record["free"]
    if n <= P:
        raise BadInput("noise", f"{n} rows for {P} parameters", "leave no residuals to draw from: name the noise")
    pool = residual[np.argsort(np.abs(residual))[P:]]
    scale = np.sqrt((residual**2).sum() / (n - P) / max(float((pool**2).mean()), 1e-300))
    return rng.choice(pool, size=shape) * scale
