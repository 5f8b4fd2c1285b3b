"""The flags of `fit`, `compare` and `plan --from`: what they are, how they are read, and what messages call them."""

from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from scalelab.errors import BadInput

# Field of a message from the library -> what the user typed.
FLAGS = {
    "law": "--law", "objective": "--objective", "delta": "--delta", "method": "--resample", "bootstrap": "--bootstrap",
    "cluster": "--cluster", "run": "--cluster", "stratify": "--stratify", "weights": "--weights", "fixed": "--fix",
    "tied": "--tie", "priors": "--prior", "fixed or tied": "--fix or --tie", "pair": "--pair", "optimal": "--with",
    "plan": "--with", "columns": "--columns", "level": "--level",
}  # fmt: skip
WORDS = (
    (r"columns=\{'(\w+)': \.\.\.\}", r"--columns \1=..."),
    (r"(?:optimal|plan)\([^()]*?, (\w+)=[^()]*\)", r"--with \1=..."),
    (r"drop=True", "--drop"),
    (r"(?:budget|run)=\.\.\.", "--cluster=..."),
)
PICTURES = (".png", ".svg", ".pdf")
ONLY_LAWS = (
    "objective",
    "delta",
    "resample",
    "stratify",
    "weights",
    "fix",
    "tie",
    "prior",
)  # not of isoflop and envelope


# ------------------------------------------------------------------------------------------------ arguments


def _fitting(p: argparse.ArgumentParser) -> None:
    """How a table is fitted, for `fit` and `compare`."""

    def add(flag: str, words: str, **kind: Any) -> None:
        p.add_argument(flag, help=words, **kind)

    several: dict[str, Any] = {"action": "append", "default": []}
    words = "a law of `scalelab fit --list`, with what it is made of (repeated-pools:web,books); default: chinchilla"
    add("--law", words, metavar="NAME[:ARG,...]")
    add("--columns", "params=N,tokens=D,loss=L where names differ", metavar="ROLE=NAME,...", **several)
    words = "huber | log-squares | squares | student | lower-edge (default: the one of the law's source)"
    add("--objective", words, metavar="NAME")
    add("--delta", "of a Huber (or Student) objective; auto: from the residuals", metavar="WIDTH")
    add("--fix", "hold parameters fixed", metavar="PARAMETER=VALUE,...", **several)
    add("--tie", "hold parameters equal", metavar="PARAMETER=OTHER,...", **several)
    add(
        "--prior",
        "what is known of parameters: mean and standard deviation",
        metavar="PARAMETER=MEAN:SD,...",
        **several,
    )
    add("--weights", "a positive number per row that multiplies its loss", metavar="COLUMN")
    add("--drop", "leave rows with unusable values out instead of refusing them", action="store_true")
    add("--bootstrap", "resamples (default: 1000; 0: point fit)", type=int, default=1000, metavar="N")
    words = "resample whole groups of rows (default: rows of one run; none: single rows); "
    words += "for isoflop the column that names a run's budget, for envelope its run"
    add("--cluster", words, default="auto", metavar="COLUMN")
    add("--resample", "kind of bootstrap (default: pairs)", choices=("pairs", "wild", "parametric"))
    add("--stratify", "resample within groups of rows", metavar="COLUMN")
    add("--seed", "of the bootstrap (default: 0)", type=int, default=0, metavar="N")
    _at_optimum(p)


def _at_optimum(p: argparse.ArgumentParser) -> None:
    words = "C = K N D; default: the table's own FLOPs per token, 6 N D where it has none"
    p.add_argument("--cost", metavar="K", help=words)
    words = "the law's further inputs at the optimum (experts=8, bits_weights=4, ...)"
    p.add_argument("--with", dest="others", action="append", default=[], metavar="INPUT=VALUE,...", help=words)


def add_fit(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", nargs="?", help="a run folder, a sweep's .json, or a .csv, .tsv, .jsonl or .parquet file")
    p.add_argument("--list", action="store_true", help="name the laws: equation, columns, source")
    _fitting(p)
    p.add_argument("--at", type=float, nargs="+", default=[], metavar="FLOP", help="budgets to allocate")
    p.add_argument("--out", metavar="FILE", help="save the fit (JSON)")


def add_compare(p: argparse.ArgumentParser) -> None:
    words = "runs, a table or a saved fit, the reference first; or one table, with --by"
    p.add_argument("arms", nargs="+", metavar="NAME=PATH", help=words)
    p.add_argument("--by", metavar="COLUMN", help="the arms are the values of this column (family, ...)")
    p.add_argument("--reference", metavar="NAME", help="the arm that the others are held against (default: the first)")
    words = "equal values mark counterparts (seed, ...), which narrows the intervals"
    p.add_argument("--pair", metavar="COLUMN,...", help=words)
    _fitting(p)
    words = "budgets, or LOW:HIGH for 13 between (default: the data's, and a decade beyond)"
    p.add_argument("--at", nargs="+", default=[], metavar="FLOP", help=words)
    p.add_argument("--level", type=float, default=0.95, metavar="P", help="of the intervals (default: 0.95)")
    words = f"a picture ({', '.join(PICTURES)}) or the comparison (.json); may be given twice"
    p.add_argument("--out", action="append", default=[], metavar="FILE", help=words)


def add_plan(p: argparse.ArgumentParser) -> None:
    words = "a saved fit instead of a config: what to train with --flops, and with --target which runs next"
    p.add_argument("--from", dest="source", metavar="FIT", help=words)
    p.add_argument("--flops", type=float, nargs="+", metavar="FLOP", help="with --from: budgets")
    words = "with --from: the run to predict; --flops is then what all the next runs may cost together"
    p.add_argument("--target", type=float, metavar="FLOP", help=words)
    p.add_argument("--out", metavar="FILE", help="with --target: save the recommended runs as a config (.py)")
    words = "with --out: of the runs (default: the one that the fitted runs name, else transformer)"
    p.add_argument("--family", metavar="NAME", help=words)
    p.add_argument("--seed", type=int, metavar="N", help="with --target: of the simulations (default: 0)")
    _at_optimum(p)


# ------------------------------------------------------------------------------------------------ values


@contextlib.contextmanager
def translated(**more: str) -> Iterator[None]:
    """Messages of the library in the words of the command line: flags for arguments."""
    try:
        yield
    except BadInput as error:
        field, remedy = error.field, error.remedy
        part = re.fullmatch(r"(\w+)\[(\w+)\]", field)
        flag = (FLAGS | more).get(part[1] if part else field, field)
        flag = f"{flag} {part[2]}" if part and flag != field else flag
        for pattern, words in WORDS:
            remedy = re.sub(pattern, words, remedy)
        raise BadInput(flag, error.value, remedy) from None


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Law.fit` that were given."""
    delta = args.delta
    if delta not in (None, "auto"):
        delta = number("--delta", delta, delta)
    out = {
        "columns": pairs("--columns", args.columns), "bootstrap": args.bootstrap, "seed": args.seed,
        "objective": args.objective, "delta": delta, "fixed": numbers("--fix", args.fix),
        "tied": pairs("--tie", args.tie), "priors": normals("--prior", args.prior), "weights": args.weights,
        "drop": args.drop, "stratify": args.stratify,
    }  # fmt: skip
    return out | ({} if args.resample is None else {"method": args.resample})


def cluster(value: str) -> str | None:
    return None if value == "none" else value


def pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE,... of all times that the flag was given."""
    found: dict[str, str] = {}
    for item in (piece for text in items for piece in text.split(",") if piece):
        name, _, value = (part.strip() for part in item.partition("="))
        if not (name and value):
            raise BadInput(flag, item, f"must be {'ROLE=NAME' if flag == '--columns' else 'NAME=VALUE'}")
        if name in found:
            raise BadInput(flag, item, f"{name} is given twice")
        found[name] = value
    return found


def numbers(flag: str, items: Sequence[str]) -> dict[str, Any]:
    return {name: number(f"{flag} {name}", value, value) for name, value in pairs(flag, items).items()}


def normals(flag: str, items: Sequence[str]) -> dict[str, tuple[float, float]]:
    found = {}
    for name, value in pairs(flag, items).items():
        mean, colon, sd = value.partition(":")
        if not colon:
            raise BadInput(f"{flag} {name}", value, "must be MEAN:SD, as E=1.69:0.05")
        found[name] = (number(f"{flag} {name}", mean, value), number(f"{flag} {name}", sd, value))
    return found


def number(flag: str, text: str, shown: Any) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadInput(flag, shown, "must be a number") from None
    if not math.isfinite(value):
        raise BadInput(flag, shown, "must be a finite number")
    return value


def positive(flag: str, values: Sequence[float]) -> None:
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise BadInput(flag, list(values), "must be positive FLOPs")


def cost(text: str | None) -> float | None:
    value = None if text is None else number("--cost", text, text)
    if value is not None and value <= 0:
        raise BadInput("--cost", text, "must be above 0: C = K N D")
    return value


def budgets(items: Sequence[str]) -> list[float] | tuple[float, float] | None:
    """--at of `compare`: numbers, or LOW:HIGH."""
    if len(items) == 1 and ":" in items[0]:
        low, _, high = items[0].partition(":")
        ends = number("--at", low, items[0]), number("--at", high, items[0])
        if not 0 < ends[0] < ends[1]:
            raise BadInput("--at", items[0], "must be LOW:HIGH, positive FLOPs and the lower first")
        return ends
    return [number("--at", item, item) for item in items] or None


def suffix(flag: str, path: str, allowed: Sequence[str]) -> None:
    if pathlib.Path(path).suffix not in allowed:
        raise BadInput(flag, path, f"must end in {', '.join(allowed)}")


def refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Flags that were given and would do nothing."""
    for name in names:
        value = getattr(args, name)
        if value not in (None, [], False):
            raise BadInput(f"--{name}", value, why)
