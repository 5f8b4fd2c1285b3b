"""What a report fits: the law and the parabolas, of all runs or of each family, and how the families compare."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pandas as pd

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws import allocate

if TYPE_CHECKING:
    from scalelab.laws import Comparison, Fit, IsoflopFit

LAW = "chinchilla"


@dataclasses.dataclass(frozen=True)
class Fits:
    """`notes`: what could not be fitted, and why."""

    fits: dict[str, Fit]
    isoflop: IsoflopFit | dict[str, IsoflopFit] | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()


def fitted(table: pd.DataFrame, bootstrap: int) -> Fits:
    """Runs of one family by one law; of several, each by its own, held against the first (the Transformer, if there).

    A family that cannot be fitted is left out, with a note. Raises `BadInput` where nothing can be fitted.
    """
    done: Any = table[table["status"] == "done"] if "status" in table else table
    families = split(done, "family") if "family" in done else {}
    if len(families) < 2:
        return Fits({LAW: laws.fit(LAW, table, bootstrap=bootstrap)}, laws.isoflop(done, bootstrap=bootstrap))
    fits, parabolas, notes = {}, {}, []
    for name in families:
        mine: Any = table[table["family"].astype(str) == name]
        try:
            fits[name] = laws.fit(LAW, mine, bootstrap=bootstrap)
        except BadInput as error:
            notes.append(f"{name} is left out: {error}")
            continue
        try:
            parabolas[name] = laws.isoflop(families[name], bootstrap=bootstrap)
        except BadInput as error:
            notes.append(f"{name} has no parabolas: {error}")
    if not fits:
        raise BadInput("path", ", ".join(families), f"no family can be fitted; {notes[0]}")
    comparison = None
    if len(fits) > 1:
        costs = {name: allocate.measured(fit.rows.columns, fit.law.paid) for name, fit in fits.items()}
        comparison = laws.compare(fits, cost=costs)
    return Fits(fits, parabolas, comparison, tuple(notes))


def split(table: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """A table by the values of one of its columns: transformer first, if it is one of them, then by name."""
    values = sorted({str(v) for v in table[column].dropna()}, key=lambda v: (v != "transformer", v))
    labels: Any = table[column].astype(str)
    return {value: pd.DataFrame(table[labels == value]) for value in values}
