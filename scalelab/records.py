"""Records: what a run was and what came of it. The truth of a study; everything else is a view of these files.

`runs/<id>/` holds `spec.json` (what), `metrics.jsonl` (each step once), `checkpoints/` and, once finished,
`record.json`, written last and atomically. A sweep is `runs/sweeps/<name>.json`, a list of ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from scalelab.errors import BadInput
from scalelab.paths import make_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
LOCK_PATIENCE = 1.0  # s


def _measured(unit: str) -> Any:
    """A field that a rerun would change: times, rates, memory, host."""
    return dataclasses.field(default=None, metadata={"unit": unit, "measured": True})


def _column(unit: str) -> Any:
    return dataclasses.field(metadata={"unit": unit, "measured": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, one row. `None` where a number does not exist. Units are in each field's metadata."""

    id: str = _column("hash of the spec")
    family: str = _column("architecture")
    status: str = _column("done | diverged")
    reason: str | None = _column("why it diverged")
    schema: int = dataclasses.field(default=SCHEMA, metadata={"unit": "", "measured": False})
    seed: int = _column("of the initialisation")
    data_seed: int = _column("of the order of the data")

    params: int = _column("parameters, embeddings included")
    params_active: int = _column("parameters that one token uses")
    params_non_embedding: int = _column("parameters without embedding and unembedding")
    width: int = _column("")
    layers: int = _column("")
    vocab_size: int = _column("")

    steps: int = _column("optimizer steps done")
    tokens: int = _column("tokens trained on")
    unique_tokens: int | None = _column("training tokens in the data; None: endless")
    epochs: float | None = _column("tokens / unique_tokens")
    flops: float = _column("FLOP of the training, exact convention")
    flops_6n: float = _column("6 N D with N = params")
    flops_6n_non_embedding: float = _column("6 N D with N = params_non_embedding")
    batch_tokens: int = _column("tokens per step")
    seq_len: int = _column("tokens")
    data: dict[str, Any] = _column("the sources: weight, content hash, size")
    tokenizer: str = _column("")

    lr: float = _column("peak learning rate")
    schedule: str = _column("")
    warmup: float = _column("share of the steps")
    weight_decay: float = _column("times the learning rate")
    optimizer: str = _column("")
    parametrization: str = _column("")
    precision: str = _column("compute dtype")

    loss: float | None = _column("held-out, nats per token, at the end")
    loss_se: float | None = _column("its standard error over documents")
    bpb: float | None = _column("held-out bits per byte")
    bpb_se: float | None = _column("its standard error")
    held_out: dict[str, Any] = _column("the same by source")
    train_loss: float | None = _column("mean over the last tenth of the steps, nats per token")
    entropy: float | None = _column("floor of the loss where the data's is known, nats per token")
    routing: dict[str, Any] | None = _column(
        "of experts: balance loss, entropies (nats), max violation, drop rate, as train_loss; load at the end by layer"
        "; of recursion r: selected_r, threshold_r (shares of tokens), accuracy_r, bce_r; held_out_selected at the end"
    )
    start: str | None = _column("hash of the parameters that it started from; None: random ones")
    start_train: str | None = _column("of such a run: all | new, the tensors that the start did not have")

    seconds: float | None = _measured("s, all attempts, compilation and evaluation included")
    step_seconds: float | None = _measured("s, median time between steps")
    tokens_per_second: float | None = _measured("batch_tokens / step_seconds")
    flops_per_second: float | None = _measured("FLOP/s at step_seconds")
    mfu: float | None = _measured("share of the device's peak; None where the peak is not known")
    peak_memory: int | None = _measured("bytes on the device; of the process on CPU")
    device: str | None = _measured("kind and number")
    host: str | None = _measured("")
    attempts: int | None = _measured("starts it took")
    started: str | None = _measured("UTC")
    finished: str | None = _measured("UTC")
    versions: dict[str, str] | None = _measured("python and packages")
    git_commit: str | None = _measured("of the code, if in a repository")
    git_dirty: bool | None = _measured("uncommitted changes")

    # What was asked of the trained model later, by name: `add_evaluations`. The spec does not give it by itself.
    evaluations: dict[str, dict[str, Any]] | None = _measured("of `scalelab eval` and `scalelab probe`, by name")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def results(self) -> dict[str, Any]:
        """The columns that the same spec gives again, bit for bit on CPU with the same versions."""
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata.get("measured", False)
        }

    @classmethod
    def from_json(cls, text: str, where: str = "record.json") -> RunRecord:
        """Reads a record of this schema or an older one; fields that it did not have yet are None."""
        try:
            document = json.loads(text)
            schema = int(document["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(where, text, f"is not a run's record ({error})") from None
        if schema > SCHEMA:
            raise BadInput(f"{where}: schema", schema, f"this scalelab reads up to {SCHEMA}; upgrade it")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: document.get(name) for name in names})


# ------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def run_lock(folder: pathlib.Path) -> Iterator[None]:
    """One process per run. The kernel drops the lock with the process, also after kill -9."""
    make_folder(folder, "--runs")
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        # Some patience: `is_locked` holds it for a moment, and so does a process that has just been killed.
        deadline = time.monotonic() + LOCK_PATIENCE
        while not _locked(file):
            if time.monotonic() > deadline:
                remedy = "is being trained by another process; wait for it or stop it"
                raise BadInput("run", folder.name, remedy)
            time.sleep(0.01)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(folder: pathlib.Path) -> bool:
    try:
        with open(folder / ".lock", "r+", encoding="utf-8") as file:
            return not _locked(file)
    except OSError:  # no such run yet
        return False


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` up to the first that a crash left unfinished."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(folder / "metrics.jsonl", "rb") as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                lines.pop()
    return lines


def last_metrics(folder: pathlib.Path) -> dict[str, Any] | None:
    """The newest whole line of `metrics.jsonl`, read from the file's end: cheap enough to poll."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            for line in reversed(file.read().splitlines(keepends=True)):
                if line.endswith(b"\n") and line.startswith(b"{"):
                    with contextlib.suppress(ValueError):
                        return json.loads(line)
    except FileNotFoundError:
        pass
    return None


def read(folder: pathlib.Path) -> RunRecord | None:
    """A run's record, or None while it has none."""
    try:
        text = (folder / "record.json").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return RunRecord.from_json(text, str(folder / "record.json"))


def add_evaluations(folder: pathlib.Path, found: Mapping[str, Mapping[str, Any]]) -> RunRecord:
    """Puts evaluations into a finished run's record, each in the place of an older one of its name.

    The record is whole at all times, and two processes at once lose nothing of each other's.
    """
    with run_lock(folder):
        record = read(folder)
        if record is None:
            raise BadInput("run", str(folder), "has no record (not finished yet)")
        evaluations = {**(record.evaluations or {}), **{name: finite(entry) for name, entry in found.items()}}
        record = dataclasses.replace(record, evaluations=evaluations)
        write_atomically(folder / "record.json", record.to_json())
    return record


def run_folders(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The run directories that a path stands for: a run, a sweep's JSON file, or a root of runs.

    Runs of a sweep that have not started yet are named too. Raises `BadInput` where there is nothing of the kind.
    """
    where = pathlib.Path(path)
    if where.is_file() and where.suffix == ".json":
        root = where.parent.parent
        try:
            return [root / run for run in json.loads(where.read_text(encoding="utf-8"))["ids"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput("path", str(path), f"is not a sweep file ({type(error).__name__}: {error})") from None
    if (where / "spec.json").is_file() or (where / "record.json").is_file():
        return [where]
    found = sorted(p.parent for p in where.glob("*/spec.json")) if where.is_dir() else []
    if not found:
        raise BadInput("path", str(path), "holds no runs; name a run, a sweep's .json or a folder of runs")
    return found


# ------------------------------------------------------------------------------------------------ tables


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Finished runs as a table, one row each, columns as in `RunRecord`; those of evaluations are `eval.NAME.NUMBER`.

    `path` is a run directory, a sweep's JSON file or a root of runs. Diverged runs are in it: look at `status`.
    """
    import pandas as pd

    rows = [dataclasses.asdict(record) for folder in run_folders(path) if (record := read(folder)) is not None]
    columns = [field.name for field in dataclasses.fields(RunRecord) if field.name != "evaluations"]
    later: dict[str, dict[int, float | None]] = {}
    for number, row in enumerate(rows):
        for name, entry in (row["evaluations"] or {}).items():
            for what, value in entry.items():
                if value is None or type(value) in (int, float):
                    later.setdefault(f"eval.{name}.{what}", {})[number] = value
    table = pd.DataFrame(rows, columns=columns)
    table = table.assign(**{name: pd.Series(values, table.index, "float64") for name, values in later.items()})
    numeric = [f.name for f in dataclasses.fields(RunRecord) if f.type in ("float", "float | None", "int | None")]
    table[numeric] = table[numeric].astype("float64")
    return table


def curves(path: str | os.PathLike[str]) -> pd.DataFrame:
    """All held-out evaluations of the runs: id, step, tokens, flops, loss, loss_se, bpb (one row per evaluation)."""
    import pandas as pd

    rows = []
    for folder in run_folders(path):
        record = read(folder)
        if record is None:
            continue
        for line in read_metrics(folder):
            if "held_out" in line:
                share = line["step"] / record.steps
                rows.append(
                    {
                        "id": record.id,
                        "family": record.family,
                        "params": record.params,
                        "step": line["step"],
                        "tokens": record.batch_tokens * line["step"],
                        "flops": record.flops * share,
                        **{name: line["held_out"][name] for name in ("loss", "loss_se", "bpb")},
                    }
                )
    columns = ["id", "family", "params", "step", "tokens", "flops", "loss", "loss_se", "bpb"]
    table = pd.DataFrame(rows, columns=columns)
    numeric = ["loss", "loss_se", "bpb"]  # None where there is no number
    table[numeric] = table[numeric].astype("float64")
    return table


def finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become None, in nested structures too."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
