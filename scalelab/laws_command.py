"""The commands `fit`, `compare` and `plan --from`: from tables and fit files to answers in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scalelab import laws_flags as flags
from scalelab.errors import BadInput

SPECIAL = ("isoflop", "envelope")  # methods of their own: no law, no objective


# ------------------------------------------------------------------------------------------------ commands


def fit(args: argparse.Namespace) -> None:
    """Fit a law to a table, say what came out, save it."""
    from scalelab import laws, tables

    if args.list:
        if args.path is not None:
            raise BadInput("--list", args.path, "goes without a table")
        return tables.laws_known(laws.LAWS)
    if args.path is None:
        raise BadInput("table", None, "name a run folder, a sweep's .json or a table; --list names the laws")
    others = flags.numbers("--with", args.others)
    cost = flags.cost(args.cost)
    with flags.translated(C="--at"):
        flags.positive("--at", args.at)
        if args.law in SPECIAL:
            found = _special(args, others)
        else:
            law = law_named(args.law or "chinchilla")
            if args.at:
                _askable(law, others, "--at")
            found = laws.fit(law, table_of(args.path), cluster=flags.cluster(args.cluster), **flags.options(args))
        if args.out:
            _saved(found.save, args.out)  # without what the budgets asked for have to say
        best = allocated(found, args.at, cost, others) if args.at else None
        print(found.summary())
        if best is not None:
            print()
            tables.allocation(best, cost_said(found, cost))


def compare(args: argparse.Namespace) -> None:
    """Fit one law to several arms and hold them against each other."""
    from scalelab import laws, plots, tables

    others, law = flags.numbers("--with", args.others), law_named(args.law or "chinchilla")
    given, columns = flags.cost(args.cost), flags.pairs("--columns", args.columns)
    for out in args.out:
        flags.suffix("--out", out, (*flags.PICTURES, ".json"))
    budgets = flags.budgets(args.at)
    pair = None if args.pair is None else args.pair.split(",")
    with flags.translated(C="--at"):
        arms = _arms(args)
        fits = {name: arm for name, arm in arms.items() if isinstance(arm, laws.Fit)}
        if len(fits) == len(arms):
            flags.refuse(
                args, ("law", "columns", "weights", "drop", *flags.ONLY_LAWS), "goes with tables; every arm is a fit"
            )
        cost = {
            name: _measured_by(arm, given) if name in fits else _measured_in(arm, columns, law.paid, given)
            for name, arm in arms.items()
        }
        for arm in fits.values() or [None]:
            _known_inputs(law if arm is None else arm.law, others)
        options = {k: v for k, v in flags.options(args).items() if k not in ("bootstrap", "seed")}
        found = laws.compare(
            arms, budgets, pair=pair if pair is None or len(pair) > 1 else pair[0], law=law, cost=cost,
            others=others, level=args.level, bootstrap=args.bootstrap, seed=args.seed,
            cluster=flags.cluster(args.cluster), **options,
        )  # fmt: skip
        for out in args.out:
            _saved(found.save if out.endswith(".json") else functools.partial(plots.save, found.plot.multiplier()), out)
    print(found.summary())
    for out in args.out:
        tables.said(f"saved: {out}")


def plan(args: argparse.Namespace) -> None:
    """From a saved fit: what to train at a budget, or which runs would make a prediction surest."""
    from scalelab import laws, tables

    if args.runs is not None:
        raise BadInput("--runs", args.runs, "goes with --config")
    if not args.flops:
        raise BadInput("--flops", None, "name the budgets that --from is to allocate")
    flags.positive("--flops", args.flops)
    others, cost = flags.numbers("--with", args.others), flags.cost(args.cost)
    if args.target is None:
        flags.refuse(args, ("out", "seed", "family"), "goes with --target")
    elif len(args.flops) > 1:
        raise BadInput("--flops", args.flops, "with --target: one budget, of all the next runs together")
    if args.out is None:
        flags.refuse(args, ("family",), "goes with --out")
    else:
        flags.suffix("--out", args.out, (".py",))
    with flags.translated(C="--flops", budget="--flops", target="--target", fit="--from", **{"fit file": "--from"}):
        found = laws.load(args.source)
        parts = {"": found}
        if isinstance(found, laws.SharedFit):
            parts = {name: found.arm(name) for name in found.arms}
        if args.target is None:
            best = {name: allocated(part, args.flops, cost, others) for name, part in parts.items()}
            for name, part in parts.items():
                tables.allocation(best[name], cost_said(part, cost), name or part.record["law"])
            return tables.findings(found)
        if not isinstance(found, laws.Fit) or len(parts) > 1:
            what = "several arms" if len(parts) > 1 else found.record.get("law", found.kind)
            raise BadInput("--target", args.target, f"needs the fit of one law; {args.source} is of {what}")
        _askable(found.law, others, "--from")
        budget = float(args.flops[0])
        chosen = laws.plan(found, budget, args.target, _measured_by(found, cost), seed=args.seed or 0, **others)
        if args.out is not None:
            _saved(functools.partial(chosen.to_config, family=args.family), args.out)
    print(chosen.summary())
    if args.out is not None:
        tables.said(f"saved: {args.out}")


def _saved(save: Callable[[str], Any], path: str) -> None:
    with flags.translated(path="--out"):
        save(path)


# ------------------------------------------------------------------------------------------------ laws and tables


def law_named(text: str) -> Any:
    """A law from NAME, or NAME:ARG,... with what its class takes, by place or as key=value."""
    from scalelab import laws

    name, _, rest = text.partition(":")
    if name not in laws.LAWS:
        near = difflib.get_close_matches(name, [*laws.LAWS, *SPECIAL], 1)
        told = f"; did you mean {near[0]}?" if near else ""
        raise BadInput("--law", text, f"must be one of those that `scalelab fit --list` names{told}")
    form = laws.LAWS[name]
    by_place, by_name = [], {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if equals:
            by_name[key] = int(value) if value.isdecimal() else value
        else:
            by_place.append(int(item) if item.isdecimal() else item)
    wanted = list(inspect.signature(form).parameters.values())
    if by_place and wanted and isinstance(wanted[0].default, tuple):
        by_place = [tuple(by_place)]
    try:
        return form(*by_place, **by_name)
    except (TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise BadInput("--law", text, error.remedy) from None
        takes = ", ".join(str(p).split(":")[0] for p in wanted) or "nothing"
        raise BadInput("--law", text, f"{name} is made of {takes}") from None


def table_of(path: str, curves: bool = False) -> Any:
    """Runs as a table, or a table from a file; `curves`: all evaluations of the runs."""
    from scalelab import laws, records

    where = pathlib.Path(path)
    plain = where.name.lower().removesuffix(".gz").removesuffix(".zst")
    if plain.endswith((".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")) or (
        where.is_file() and where.suffix != ".json"
    ):
        return laws.read_table(path)
    table = records.curves(path) if curves else records.load(path)
    if table.empty:
        raise BadInput("path", path, "holds no finished run yet; see `scalelab status`")
    return table


def _special(args: argparse.Namespace, others: Mapping[str, float]) -> Any:
    """IsoFLOP parabolas and envelopes: no law, so none of its options."""
    from scalelab import laws

    flags.refuse(args, flags.ONLY_LAWS, f"does not go with --law {args.law}")
    if others:
        raise BadInput("--with", list(others), f"does not go with --law {args.law}")
    if args.cost is not None:
        raise BadInput("--cost", args.cost, f"does not go with --law {args.law}, whose table says what a token costs")
    if args.cluster == "none":
        raise BadInput("--cluster", "none", f"--law {args.law} needs the rows that belong together")
    common = {"columns": flags.pairs("--columns", args.columns), "bootstrap": args.bootstrap, "seed": args.seed}
    common["drop"] = args.drop
    column = None if args.cluster == "auto" else args.cluster
    if args.law == "isoflop":
        return laws.isoflop(table_of(args.path), budget=column, **common)
    return laws.envelope(table_of(args.path, curves=True), run=column, **common)


def _arms(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> table or fit, the reference first."""
    from scalelab import report_fits

    arms: dict[str, Any] = {}
    if args.by is not None:
        if len(args.arms) > 1:
            raise BadInput("--by", args.by, f"splits one table; {len(args.arms)} are named")
        table = table_of(args.arms[0])
        if args.by not in table:
            raise BadInput("--by", args.by, f"no such column; the table has {', '.join(map(str, table.columns))}")
        arms = dict(report_fits.split(table, args.by))
    for item in args.arms if args.by is None else ():
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise BadInput("arms", item, "must be NAME=PATH; or one table, with --by COLUMN")
        if name in arms:
            raise BadInput("arms", item, "that name is another arm's already")
        arms[name] = _arm(path)
    if len(arms) < 2:
        raise BadInput("arms" if args.by is None else "--by", args.by or args.arms, "a comparison needs two arms")
    if args.reference is not None:
        if args.reference not in arms:
            raise BadInput("--reference", args.reference, f"must be one of {', '.join(arms)}")
        arms = {args.reference: arms[args.reference]} | arms
    return arms


def _arm(path: str) -> Any:
    """A table, or the fit that a JSON file holds (a sweep's file is JSON too)."""
    from scalelab import laws

    stored = None
    if pathlib.Path(path).suffix == ".json":
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not (isinstance(stored, dict) and "kind" in stored):
        return table_of(path)
    found = laws.load(path)
    if not isinstance(found, laws.Fit):
        raise BadInput("arms", path, f"is no fit of a law but of kind {stored['kind']}")
    return found


# ------------------------------------------------------------------------------------------------ the optimum


def allocated(found: Any, flops: Sequence[float], cost: float | None, others: Mapping[str, float]) -> Any:
    """N*, D* and the target at budgets, from any fit that can say; raises `BadInput` for the others."""
    from scalelab import laws

    if not hasattr(found, "optimal"):
        raise BadInput("fit", found.record.get("law", found.kind), "allocates no compute")
    if not isinstance(found, laws.Fit):
        if others or cost is not None:
            raise BadInput("--with" if others else "--cost", list(others) or cost, "goes with the fit of a law")
        return found.optimal(flops)
    _askable(found.law, others, "fit")
    return found.optimal(flops, _measured_by(found, cost), **others)


def _askable(law: Any, others: Mapping[str, float], flag: str) -> None:
    """Whether there is an optimum at these further inputs."""
    if not law.allocates:
        raise BadInput(flag, law.name, "has no compute-optimal allocation of parameters and tokens")
    _known_inputs(law, others)
    missing = [role for role in law.inputs if role not in (law.paid, "tokens", *others)]
    if missing:
        raise BadInput("--with", list(others), f"{law.name} needs a value for each: --with {missing[0]}=...")


def _known_inputs(law: Any, others: Mapping[str, float]) -> None:
    further = [role for role in law.inputs if role not in (law.paid, "tokens")]
    for name, value in others.items():
        if name not in further:
            told = f"must be one of {', '.join(further)}" if further else "there are none"
            raise BadInput(f"--with {name}", value, f"is no further input of {law.name}: {told}")
        if not math.isfinite(value) or (value <= 0 and name not in law.may_be_zero):
            raise BadInput(f"--with {name}", value, "must be a finite number above 0")


def _measured_by(found: Any, cost: float | None) -> Any:
    """The cost given, or FLOPs per token from the fit's own rows where all have FLOPs, or 6 N D."""
    from scalelab.laws import allocate

    return allocate.measured(found.rows.columns, found.law.paid) if cost is None else cost


def _measured_in(table: Any, columns: Mapping[str, str], paid: str, cost: float | None) -> Any:
    """The same from a table that is not fitted yet."""
    from scalelab.laws import allocate

    if cost is not None:
        return cost
    done = table[table["status"] == "done"] if "status" in table else table
    named = {role: columns.get(role, role) for role in (paid, "tokens", "flops")}
    return allocate.measured({role: done[name] for role, name in named.items() if name in done}, paid)


def cost_said(found: Any, cost: float | None) -> str:
    """What C is, in words."""
    measured = not hasattr(found, "rows") or (cost is None and callable(_measured_by(found, None)))
    return "C by the table's own FLOPs per token" if measured else f"C = {6 if cost is None else cost:g} N D"
