"""Tables in: any pandas table, dict of arrays or file -> the rows that a law is fitted to, by role."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from jaxtyping import Int

from scalelab.errors import BadInput, FeatureMissing
from scalelab.laws.notices import Notice, name_rows

# Roles that any table may fill beside the law's own inputs and target. A role is read from the column of its name,
# which is RunRecord's, unless `columns=` says otherwise.
NUMBERS = (
    "params", "params_non_embedding", "tokens", "loss", "flops", "loss_se", "unique_tokens", "lr", "batch_tokens",
    "seq_len", "vocab_size", "step", "steps", "seconds",
)  # fmt: skip
LABELS = (
    "status", "seed", "id", "family", "run", "data_seed", "schedule", "tokenizer", "eval_set", "params_kind",
    "parametrization",
)  # fmt: skip


class Convertible(Protocol):
    """A table of another library (polars, pyarrow, ...)."""

    def to_pandas(self) -> pd.DataFrame: ...


Table = pd.DataFrame | Mapping[str, Any] | Convertible | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows used, role by role, and how they relate to the caller's table.

    `position[i]` is the used row that row i of the table went to, or -1 where it was left out; a duplicate goes to
    the row it repeats. `names` are what messages call the rows: their `id`, or the label in the table's index.
    """

    columns: dict[str, np.ndarray]
    index: pd.Index
    names: list[str]
    weights: np.ndarray
    clusters: np.ndarray | None
    position: Int[np.ndarray, " table"]
    notices: tuple[Notice, ...] = ()
    keys: tuple[str, ...] = ("params", "tokens", "loss")  # the law's inputs and target, which order and identify rows
    cluster: str | None = None  # the column that `clusters` comes from
    strata: np.ndarray | None = None
    labels: tuple[str, ...] = ()  # the values of the law's group column, whose integers are in `columns`

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def compute(self) -> np.ndarray:
        """Training FLOPs: the `flops` column where it is known, 6 N D elsewhere. Needs `has_compute`."""
        flops = self.columns.get("flops")
        if "params" not in self.columns or "tokens" not in self.columns:
            assert flops is not None
            return flops
        plain = 6.0 * self.columns["params"] * self.columns["tokens"]
        return plain if flops is None else np.where(np.isfinite(flops) & (flops > 0), flops, plain)

    @property
    def has_compute(self) -> bool:
        flops = self.columns.get("flops")
        measured = flops is not None and bool((np.isfinite(flops) & (flops > 0)).all())
        known = [self.columns.get(role) for role in ("params", "tokens")]
        return measured or all(v is not None and bool((np.isfinite(v) & (v > 0)).all()) for v in known)

    def order(self) -> np.ndarray:
        """Positions in a canonical order, so that nothing depends on the order of the caller's table."""
        return np.lexsort([self.weights, *(self.columns[role] for role in reversed(self.keys))])

    def digest(self, roles: Sequence[str]) -> str:
        """SHA-256 of what the fit sees, whatever the order of the rows."""
        seen = np.stack([*(self.columns[role] for role in roles), self.weights])[:, self.order()]
        return hashlib.sha256(np.ascontiguousarray(seen).tobytes()).hexdigest()

    def take(self, keep: np.ndarray) -> Rows:
        """The rows where `keep` is true."""
        kept = np.flatnonzero(keep)
        return Rows(
            {role: values[kept] for role, values in self.columns.items()},
            self.index[kept],
            [self.names[i] for i in kept],
            self.weights[kept],
            None if self.clusters is None else self.clusters[kept],
            np.arange(len(kept)),
            (),
            self.keys,
            self.cluster,
            None if self.strata is None else self.strata[kept],
            self.labels,
        )

    def document(self) -> dict[str, Any]:
        """Everything but the notices, which are the fit's."""
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("index", "notices")
        } | {"index": list(self.index)}


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A table from .csv, .tsv, .jsonl (also .gz, .zst) or .parquet. Raises `BadInput` for what cannot be read."""
    path = pathlib.Path(path)
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if not path.is_file():
        raise BadInput("table", str(path), "no such file")
    try:
        if name.endswith((".csv", ".tsv")):
            table = pd.read_csv(path, sep="\t" if name.endswith(".tsv") else ",")
        elif name.endswith((".jsonl", ".ndjson")):
            table = pd.read_json(path, lines=True)
        elif name.endswith(".parquet"):
            table = pd.read_parquet(path)
        else:
            raise BadInput("table", str(path), "must be a .csv, .tsv, .jsonl or .parquet file")
    except ImportError:
        raise FeatureMissing("reading Parquet", "pyarrow", "parquet") from None
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput("table", str(path), f"cannot be read: {str(error).splitlines()[0]}") from None
    if table.empty:
        raise BadInput("table", str(path), "has no rows")
    return table


def prepare(
    table: Table,
    inputs: Sequence[str],
    *,
    target: str = "loss",
    columns: Mapping[str, str] | None = None,
    weights: str | Sequence[float] | np.ndarray | None = None,
    cluster: str | None = "auto",
    stratify: str | None = None,
    drop: bool = False,
    may_be_zero: Sequence[str] = (),
    group: str | None = None,
    ranges: Mapping[str, tuple[float, float]] = types.MappingProxyType({}),
) -> Rows:
    """The table's rows that can be fitted, by role.

    Runs whose `status` is not "done" are left out, with a notice that names them. NaN, infinite or non-positive
    values of an input, the target or a weight, and values outside `ranges` (role -> lowest and highest), raise
    `BadInput` that names the rows, or are left out with a notice where `drop` is true; roles in `may_be_zero` need not
    be positive. A row equal to an earlier one in every input, target, seed and schedule is counted once, with a
    notice. `cluster="auto"`: the column `run`, or `id`, where two rows share a value.
    """
    frame = frame_of(table)
    own = (*inputs, target)
    source = _sources(frame, columns or {}, own)
    notices: list[Notice] = []
    names = [str(v) for v in (frame[source["id"]] if "id" in source else frame.index)]
    keep = np.ones(len(frame), bool)

    if "status" in source:
        status: Any = frame[source["status"]].astype(object)
        done = (status == "done").to_numpy(bool)
        if not done.all():
            counts = status[~done].fillna("no status").value_counts().to_dict()
            left = [n for n, d in zip(names, done, strict=True) if not d]
            notices.append(
                Notice(
                    "run-not-done",
                    "warning",
                    f"Left out {len(left)} of {len(frame)} rows whose status is not done "
                    f"({', '.join(f'{v} {k}' for k, v in counts.items())}): {name_rows(left)}.",
                    "finish these runs, or accept a law of the runs that finished.",
                    {"rows": left, "status": counts},
                )
            )
        keep &= done
        if not keep.any():
            raise BadInput("table", f"{len(frame)} rows", "has no row whose status is done")

    labels: tuple[str, ...] = ()
    values: dict[str, np.ndarray] = {}
    for role in dict.fromkeys([*own, *NUMBERS]):
        if role == group:
            values[role], labels = _labels(frame, source[role], keep)
        elif role in source:
            values[role] = _numbers(frame, source[role], required=role in own)
    weight = _weights(frame, weights)
    for what in ("nonfinite", "nonpositive", "out-of-range"):
        for role, array in [*((r, values[r]) for r in own), ("weights", weight)]:
            low, high = ranges.get(role, (-np.inf, np.inf))
            if what == "nonpositive" and (role in may_be_zero or role == group):
                continue
            wrong = {"nonfinite": ~np.isfinite(array), "nonpositive": array <= 0}
            bad = keep & (wrong[what] if what in wrong else (array < low) | (array > high))
            if not bad.any():
                continue
            left = [names[i] for i in np.flatnonzero(bad)]
            column = source.get(role, role)
            if not drop:
                must = f"lie from {low:g} to {high:g}" if what == "out-of-range" else "be a finite number above 0"
                raise BadInput(
                    f"column {column}",
                    array[bad][:5].tolist(),
                    f"{what} in row {name_rows(left)}; must {must}; drop=True leaves such rows out",
                )
            notices.append(
                Notice(
                    f"{what}-row",
                    "warning",
                    f"Left out {len(left)} rows with a {what} value in column {column}: {name_rows(left)}.",
                    "mend the table, or say in your write-up that these rows are missing.",
                    {"rows": left, "column": column},
                )
            )
            keep &= ~bad
    if not keep.any():
        raise BadInput("table", f"{len(frame)} rows", "has no row left to fit")

    position = np.full(len(frame), -1)
    kept = np.flatnonzero(keep)
    key = [values[role][kept] for role in own]
    for role in ("seed", "schedule"):  # runs that differ in these are no copies, though they be equal so far
        if role in source:
            key.append(pd.factorize(frame[source[role]].iloc[kept])[0])
    _, where, inverse = np.unique(np.stack(key, axis=1), axis=0, return_index=True, return_inverse=True)
    used = kept[np.sort(where)]
    first = np.argsort(np.argsort(where))[inverse.reshape(-1)]
    position[kept] = first
    if len(used) < len(kept):
        repeats = sorted(set(kept) - set(used))
        notices.append(
            Notice(
                "duplicate-rows",
                "warning",
                f"{len(repeats)} rows repeat an earlier row exactly and are counted once: "
                f"{name_rows(names[i] for i in repeats)}.",
                "give replicates a seed column; remove copies.",
                {"rows": [names[i] for i in repeats]},
            )
        )

    if cluster == "auto":
        shared = (source[role] for role in ("run", "id") if role in source)
        cluster = next((c for c in shared if frame[c].iloc[used].duplicated().any()), None)
    for field, column in (("cluster", cluster), ("stratify", stratify)):
        if column is not None and column not in frame:
            raise BadInput(field, column, f"no such column; the table has {', '.join(map(str, frame.columns))}")
    columns_used: dict[str, np.ndarray] = {role: array[used] for role, array in values.items()}
    for role in LABELS:
        if role in source and role not in columns_used and role != "status":
            columns_used[role] = frame[source[role]].to_numpy()[used]
    return Rows(
        columns_used,
        frame.index[used],
        [names[i] for i in used],
        weight[used],
        None if cluster is None else pd.factorize(frame[cluster].iloc[used], use_na_sentinel=False)[0],
        position,
        tuple(notices),
        own,
        cluster,
        None if stratify is None else pd.factorize(frame[stratify].iloc[used], use_na_sentinel=False)[0],
        labels,
    )


def inputs_of(
    table: Table,
    roles: Sequence[str],
    columns: Mapping[str, str],
    may_be_zero: Sequence[str] = (),
    group: str | None = None,
    labels: Sequence[str] = (),
    ranges: Mapping[str, tuple[float, float]] = types.MappingProxyType({}),
) -> tuple[dict[str, np.ndarray], pd.Index]:
    """The named roles of a table at which to evaluate a law: finite, in range, positive unless they may be 0."""
    frame = frame_of(table)
    source = _sources(frame, {k: v for k, v in columns.items() if v in frame}, roles)
    values = {}
    for role in roles:
        if role == group:
            unknown = set(frame[source[role]].astype(str)) - set(labels)
            if unknown:
                raise BadInput(f"column {source[role]}", sorted(unknown)[:5], f"the fit knows {', '.join(labels)}")
            values[role] = frame[source[role]].astype(str).map(list(labels).index).to_numpy(float)
            continue
        array = values[role] = _numbers(frame, source[role], required=True)
        low, high = ranges.get(role, (-np.inf, np.inf))
        bad = ~(np.isfinite(array) & ((array > 0) | (role in may_be_zero))) | (array < low) | (array > high)
        if bad.any():
            must = f"finite{'' if role in may_be_zero else ' and above 0'}"
            must += f", from {low:g} to {high:g}" if role in ranges else ""
            raise BadInput(
                f"column {source[role]}",
                array[bad][:5].tolist(),
                f"must be {must}; see row {name_rows(frame.index[bad])}",
            )
    return values, frame.index


def _labels(frame: pd.DataFrame, column: str, keep: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column of labels as integers, and the labels in sorted order."""
    text = frame[column].astype(str)
    labels = tuple(sorted(set(text[keep])))
    return np.searchsorted(labels, text).astype(float), labels


def frame_of(table: Table) -> pd.DataFrame:
    if isinstance(table, pd.DataFrame):
        frame = table
    elif isinstance(table, str | os.PathLike):
        return read_table(table)
    elif isinstance(table, Mapping):
        arrays = {name: np.atleast_1d(np.asarray(values)) for name, values in table.items()}
        lengths = {name: len(a) for name, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise BadInput("table", lengths, "columns must have one length")
        frame = pd.DataFrame(arrays)
    elif hasattr(table, "to_pandas"):  # polars, pyarrow and others
        frame = table.to_pandas()
    else:
        raise BadInput("table", type(table).__name__, "must be a DataFrame, a mapping of columns, or a file's path")
    if frame.empty:
        raise BadInput("table", f"{len(frame)} rows", "has nothing to fit")
    return frame


def _sources(frame: pd.DataFrame, columns: Mapping[str, str], required: Sequence[str]) -> dict[str, str]:
    """Role -> column of this table."""
    have = ", ".join(map(str, frame.columns))
    roles = tuple(dict.fromkeys([*required, *NUMBERS, *LABELS]))
    for role, column in columns.items():
        if role not in roles:
            raise BadInput("columns", role, f"is no role of this law; its roles are {', '.join(roles)}")
        if column not in frame:
            raise BadInput(f"columns[{role}]", column, f"no such column; the table has {have}")
    source = {role: columns.get(role, role) for role in roles if columns.get(role, role) in frame}
    for role in required:
        if role not in source:
            raise BadInput(
                "table", list(frame.columns), f"needs a column {role}; name yours: columns={{'{role}': ...}}"
            )
    return source


def _numbers(frame: pd.DataFrame, column: str, *, required: bool) -> np.ndarray:
    try:
        values: Any = pd.to_numeric(frame[column], errors="raise" if required else "coerce")
        return values.to_numpy(np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise BadInput(f"column {column}", frame[column].iloc[0], f"must hold numbers ({error})") from None


def _weights(frame: pd.DataFrame, weights: str | Sequence[float] | np.ndarray | None) -> np.ndarray:
    if weights is None:
        return np.ones(len(frame))
    if isinstance(weights, str):
        if weights not in frame:
            raise BadInput("weights", weights, f"no such column; the table has {', '.join(map(str, frame.columns))}")
        return _numbers(frame, weights, required=True)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (len(frame),):
        raise BadInput("weights", array.shape, f"must be one number for each of the {len(frame)} rows")
    return array
