"""What every fit can do: parameters with intervals from draws, findings, text, an exact round trip to disk."""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import platform
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

import scalelab
from scalelab.errors import BadInput
from scalelab.laws.notices import Notice
from scalelab.laws.shown import Notices, Shown, worst_first
from scalelab.paths import save

SCHEMA = 2


class Result(Shown):
    """Estimates, one row of `samples` per bootstrap draw (NaN where a refit failed), and notices.

    `record` says how the numbers came about; `inputs` is the data they came from.
    """

    kind = "result"

    def __init__(
        self,
        names: tuple[str, ...],
        estimate: Float[np.ndarray, " P"],
        samples: Float[np.ndarray, "draws P"],
        notices: list[Notice],
        record: dict[str, Any],
    ):
        self.names, self.estimate, self.samples = names, estimate, samples
        self._notices, self.record = list(notices), record

    # ---------------------------------------------------------------------------------------- numbers

    @property
    def params(self) -> pd.Series:
        """The estimates on their natural scale."""
        return pd.Series(self.estimate, index=list(self.names), name="estimate")

    @property
    def draws(self) -> pd.DataFrame:
        """The estimates of each bootstrap draw; NaN where the refit did not converge."""
        return pd.DataFrame(self.samples, columns=list(self.names)).rename_axis("draw")

    @property
    def notices(self) -> list[Notice]:
        """Findings so far."""
        return self._notices

    @property
    def warnings(self) -> Notices:
        """Findings about the data and the fit, worst first."""
        return worst_first(self.notices)

    @property
    def ok(self) -> bool:
        """Converged, identified, and free of findings of severity `error`. Intervals are withheld where False."""
        return bool(np.isfinite(self.estimate).any()) and not any(n.severity == "error" for n in self.notices)

    def conf_int(self, level: float = 0.95) -> pd.DataFrame:
        """Percentile bootstrap intervals, columns `lower` and `upper`; NaN without draws or where not `ok`."""
        lower, upper = self.interval(self.samples, level)
        return pd.DataFrame({"lower": lower, "upper": upper}, index=list(self.names))

    def interval(self, samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """The percentile interval of any quantity computed per draw (first axis)."""
        if not 0 < level < 1:
            raise BadInput("level", level, "must lie between 0 and 1")
        shape = samples.shape[1:]
        enough = np.isfinite(samples).sum(0) >= 0.5 * max(1, len(samples))
        if not self.ok or not len(samples) or not enough.any():
            return np.full(shape, np.nan), np.full(shape, np.nan)
        tails = [(1 - level) / 2, (1 + level) / 2]
        lower, upper = np.nanquantile(np.where(enough, samples, 0.0), tails, axis=0)
        return np.where(enough, lower, np.nan), np.where(enough, upper, np.nan)

    @property
    def bse(self) -> pd.Series:
        """Standard deviations of the bootstrap draws."""
        return pd.Series(np.sqrt(np.diag(self.cov_params())), index=list(self.names), name="bse")

    def cov_params(self) -> pd.DataFrame:
        """Covariance of the bootstrap draws; NaN without draws or where not `ok`."""
        good = self.samples[np.isfinite(self.samples).all(1)]
        P = len(self.names)
        usable = self.ok and len(good) > 1
        cov = np.cov(good, rowvar=False).reshape(P, P) if usable else np.full((P, P), np.nan)
        return pd.DataFrame(cov, index=list(self.names), columns=list(self.names))

    def add(self, notice: Notice) -> None:
        """Keep a finding, once: a later one of the same code takes the place of the earlier."""
        self._notices = [n for n in self._notices if n.code != notice.code] + [notice]

    def __repr__(self) -> str:
        values = ", ".join(f"{n}={v:.4g}" for n, v in zip(self.names, self.estimate, strict=True))
        codes = sorted({n.code for n in self.notices})
        return f"<{type(self).__name__} {values}{' warnings: ' + ', '.join(codes) if codes else ''}>"

    def parameter_lines(self, level: float = 0.95) -> list[str]:
        interval = self.conf_int(level)
        shown = bool(interval.notna().to_numpy().any())
        head = f"{'':>8} {'estimate':>12}" + (
            f" {'[lower':>12} {'upper]':>12}   {100 * level:g} % bootstrap" if shown else ""
        )
        lines = [head]
        for name, value in self.params.items():
            line = f"{name:>8} {value:12.5g}"
            if shown:
                line += f" {interval.lower[name]:12.5g} {interval.upper[name]:12.5g}"
            lines.append(line)
        if not shown:
            why = "no bootstrap was asked for" if not len(self.samples) else "the fit is not to be used, see below"
            lines.append(f"no intervals: {why}")
        return lines

    def notice_lines(self) -> list[str]:
        return str(self.warnings).split("\n")

    # ---------------------------------------------------------------------------------------- disk

    def document(self) -> dict[str, Any]:
        """Everything that the file holds; subclasses add what they need to come back."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "params": dict(zip(self.names, map(float, self.estimate), strict=True)),
            "draws": self.samples.tolist(),
            "warnings": [vars(n) for n in self._notices],
            "record": self.record,
        }

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the fit as JSON, atomically; `laws.load` gives it back bit for bit."""
        text = json.dumps(jsonable(self.document()), allow_nan=False, indent=1) + "\n"
        return save(path, text)


def provenance() -> dict[str, Any]:
    """When and with what versions."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "scalelab": scalelab.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pandas": pd.__version__,
        },
    }


def jsonable(value: Any) -> Any:
    """NumPy and NaN -> plain JSON: NaN and infinities become null and strings, floats keep all their digits."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(v) for v in value]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
