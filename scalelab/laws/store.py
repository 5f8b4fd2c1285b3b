"""Fit files back into fits."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws.isoflop import IsoflopFit
from scalelab.laws.law import Fit, Law
from scalelab.laws.notices import Notice
from scalelab.laws.result import SCHEMA, Result
from scalelab.laws.table import Rows


def load(path: str | os.PathLike[str], known: dict[str, type[Law]]) -> Any:
    """A fit from its file, bit for bit. `known` maps names to laws. Raises `BadInput` for other files."""
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
    names = tuple(document["params"])
    common = (
        array(list(document["params"].values())),
        array(document["draws"]).reshape(-1, len(names)),
        [Notice(**n) for n in document["warnings"]],
        document["record"],
    )
    fit: Result
    if kind == "isoflop":
        fit = IsoflopFit.restore(names, *common, document)
    elif document["law"] in known:
        fit = Fit(known[document["law"]](), _rows(document["rows"]), *common)
    else:
        raise BadInput(f"{path.name}: law", document["law"], f"is none of {', '.join(sorted(known))}")
    return fit


def array(values: list[Any]) -> np.ndarray:
    """JSON numbers to float64; null is NaN."""
    return np.array(values, dtype=np.float64)


def _rows(stored: dict[str, Any]) -> Rows:
    columns = {
        role: np.array(values) if role in ("id", "family", "seed") else array(values)
        for role, values in stored["columns"].items()
    }
    clusters = stored["clusters"]
    return Rows(
        columns,
        pd.Index(stored["index"]),
        stored["names"],
        array(stored["weights"]),
        None if clusters is None else np.array(clusters),
        np.array(stored["position"]),
    )
