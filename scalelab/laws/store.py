"""Fit files back into fits."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws.comparison import Comparison
from scalelab.laws.envelope import EnvelopeFit
from scalelab.laws.fit import Fit, Options
from scalelab.laws.isoflop import IsoflopFit
from scalelab.laws.joint import Joint
from scalelab.laws.law import Law
from scalelab.laws.notices import Notice
from scalelab.laws.objective import Objective
from scalelab.laws.optimum import LrOptimum
from scalelab.laws.passk import BetaTail
from scalelab.laws.result import SCHEMA, Result
from scalelab.laws.shared import SharedFit
from scalelab.laws.table import LABELS, Rows

# fits that are no law's
TABLES: dict[str, Any] = {
    "isoflop": IsoflopFit, "envelope": EnvelopeFit, BetaTail.kind: BetaTail, LrOptimum.kind: LrOptimum,
}  # fmt: skip


def load(path: str | os.PathLike[str], known: Mapping[str, Callable[..., Law]], law: Law | None = None) -> Any:
    """A fit from its file, bit for bit. `known` maps names to laws; `law` is the user's own, where it is theirs.

    Raises `BadInput` for other files.
    """
    path = pathlib.Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema, kind = document["schema"], document["kind"]
    except OSError as error:
        raise BadInput("fit file", str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput("fit file", str(path), "is not a fit saved by scalelab") from None
    if schema > SCHEMA:
        raise BadInput(f"{path.name}: schema", schema, f"this scalelab reads up to {SCHEMA}; upgrade it")
    if kind == "comparison":
        return Comparison.restore(document)
    names = tuple(document["params"])
    common = (
        array(list(document["params"].values())),
        array(document["draws"]).reshape(-1, len(names)),
        [Notice.restore(n) for n in document["warnings"]],
        document["record"],
    )
    fit: Result
    if kind in TABLES:
        fit = TABLES[kind].restore(names, *common, document)
    else:
        name, arguments = document["law"], document.get("arguments", {})
        by_place, by_name = ([], arguments) if isinstance(arguments, dict) else (arguments, {})
        if law is None and name not in known:
            remedy = f"is none of {', '.join(sorted(known))}; for a law of your own: laws.load(path, law=...)"
            raise BadInput(f"{path.name}: law", name, remedy)
        law = law or known[name](*by_place, **by_name)
        if kind == "shared":
            law = Joint(law, document["arms"])
        if (law.name, tuple(law.parameters)) != (name, names):
            raise BadInput(f"{path.name}: law", f"{name} of {', '.join(names)}", f"is not the law given, {law.name}")
        record = common[3]
        record["value"] = float(array([record["value"]])[0])  # of a fit that has not converged it may be no number
        if "options" in record:
            options = Options.restore(record["options"])
        else:  # schema 1
            options = Options(Objective("huber", "log", record["delta"]), seed=record["seed"])
            record |= {"free": len(names), "agreeing": round(record["agreement"] * record["starts"])}
        fit = Fit(law, _rows(document["rows"]), options, *common)
        if kind == "shared":
            fit = SharedFit(fit)
        fit._examined = fit._studied = True  # its findings are in the file
    return fit


def array(values: list[Any]) -> np.ndarray:
    """JSON numbers to float64; null is NaN."""
    return np.array(values, dtype=np.float64)


def _rows(stored: dict[str, Any]) -> Rows:
    columns = {
        role: np.array(values) if role in LABELS else array(values) for role, values in stored["columns"].items()
    }
    optional = {name: None if stored.get(name) is None else np.array(stored[name]) for name in ("clusters", "strata")}
    return Rows(
        columns,
        pd.Index(stored["index"]),
        stored["names"],
        array(stored["weights"]),
        optional["clusters"],
        np.array(stored["position"]),
        keys=tuple(stored.get("keys", ("params", "tokens", "loss"))),
        cluster=stored.get("cluster"),
        strata=optional["strata"],
        labels=tuple(stored.get("labels", ())),
    )
