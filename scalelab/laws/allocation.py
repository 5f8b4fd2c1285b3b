"""Fits whose parameters are the two power laws of compute-optimal training: N* = N_coef C^a, D* = D_coef C^b."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.result import Result

NAMES = ("a", "b", "N_coef", "D_coef")


class AllocationFit(Result):
    """`params`: a, b of N* = N_coef C^a and D* = D_coef C^b; one row of `samples` per bootstrap draw."""

    def optimal(self, C: float | Sequence[float] | np.ndarray) -> pd.Series | pd.DataFrame:
        """N* and D* at C FLOPs from the two power laws, with 95 % intervals; NaN where there are none."""
        flops = np.atleast_1d(np.asarray(C, dtype=np.float64))
        if flops.ndim != 1 or not (np.isfinite(flops) & (flops > 0)).all():
            raise BadInput("C", C, "must be positive FLOPs, one number or a list of them")
        out: dict[str, np.ndarray] = {"flops": flops}
        for name, exponent, coefficient in (("params", 0, 2), ("tokens", 1, 3)):
            out[name] = self.estimate[coefficient] * flops ** self.estimate[exponent]
            drawn = self.samples[:, coefficient, None] * flops ** self.samples[:, exponent, None]
            out[f"{name}_lower"], out[f"{name}_upper"] = self.interval(drawn)
        frame = pd.DataFrame(out)
        return frame if np.ndim(C) else frame.iloc[0].rename(float(flops[0]))


def power_laws(
    log_c: Float[np.ndarray, " g"], log_n: Float[np.ndarray, "R g"], log_d: Float[np.ndarray, "R g"]
) -> Float[np.ndarray, "R 4"]:
    """a, b, N_coef, D_coef of least-squares lines through the points where ln N* is known; NaN with fewer than two."""
    seen = np.isfinite(log_n)
    count = seen.sum(1)
    out = []
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x = np.where(seen, log_c, 0).sum(1) / count
        dx = np.where(seen, log_c - mean_x[:, None], 0)
        for target in (log_n, log_d):
            mean_y = np.where(seen, target, 0).sum(1) / count
            slope = (dx * np.where(seen, target - mean_y[:, None], 0)).sum(1) / (dx**2).sum(1)
            enough = count >= 2
            out.append((np.where(enough, slope, np.nan), np.where(enough, np.exp(mean_y - slope * mean_x), np.nan)))
    (a, n0), (b, d0) = out
    return np.stack([a, b, n0, d0], axis=1)
