"""Seed noise from replicates: runs with the same inputs and different seeds."""

from __future__ import annotations

import dataclasses

import numpy as np

from scalelab.laws.notices import Notice
from scalelab.laws.table import Rows


@dataclasses.dataclass(frozen=True)
class SeedNoise:
    """`relative`: standard deviation of ln target between seeds, pooled over `groups` of replicates with `freedom`
    degrees of freedom. NaN where no inputs were run twice."""

    relative: float
    freedom: int
    groups: int

    @property
    def known(self) -> bool:
        return self.freedom > 0

    @property
    def mean_abs(self) -> float:
        """The mean absolute relative error of a law without any error of its own, were the noise normal."""
        return self.relative * float(np.sqrt(2 / np.pi))

    def __str__(self) -> str:
        if not self.known:
            return "unknown (no replicates)"
        return (
            f"{self.relative:.3%} of the loss ({self.freedom} degrees of freedom in {self.groups} sets of replicates)"
        )


def seed_noise(rows: Rows, inputs: tuple[str, ...], target: str) -> SeedNoise:
    """The pooled spread within rows whose inputs agree to one part in a million."""
    keys = []
    for role in inputs:
        values = rows.columns[role]
        keys.append(np.round(np.log(values), 6) if (values > 0).all() else values)
    _, group = np.unique(np.stack(keys), axis=1, return_inverse=True)
    group = group.reshape(-1)
    count = np.bincount(group)
    freedom = int((count - 1).sum())
    if not freedom:
        return SeedNoise(float("nan"), 0, 0)
    data = rows.columns[target]
    logs = np.log(data) if (data > 0).all() else data / np.abs(data).mean()
    mean = np.bincount(group, logs) / count
    return SeedNoise(float(np.sqrt(((logs - mean[group]) ** 2).sum() / freedom)), freedom, int((count > 1).sum()))


def unknown(scatter: float) -> Notice:
    """What to say where a claim needs the seed noise and there are no replicates."""
    return Notice(
        "seed-noise-unknown",
        "note",
        f"no inputs were run with two seeds: errors are judged by the residuals' scatter ({scatter:.2%}), which a "
        "wrong form inflates.",
        "run two or three cheap sizes with another seed, and give the table a seed column.",
        {"scatter": scatter},
    )
