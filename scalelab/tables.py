"""What the commands print: plans, outcomes, status. Views of specs and records, nothing is computed here twice."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scalelab import models, records
from scalelab.config import RunSpec
from scalelab.data import probes
from scalelab.errors import BadInput
from scalelab.launch.local import Outcome, failure
from scalelab.parametrization import Rule
from scalelab.records import RunRecord
from scalelab.schema import Config
from scalelab.sweep import Clock, Corpora, Sweep
from scalelab.sweep import plan as plan_run

if TYPE_CHECKING:
    import pandas as pd


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise  # the error that rich is handling, and would answer with exit status 1


def _console() -> Console:
    console = _Console()
    return console if console.is_terminal else _Console(width=140)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        words = name == "note"  # the only column that may be long: it wraps, so that the others need not
        table.add_column(name, justify="left" if number == 0 or words else "right", no_wrap=not words, overflow="fold")
    return table


def count(value: float | None, unit: str = "") -> str:
    """Three digits and a suffix: 1.23M, 456k."""
    if value is None:
        return "-"
    for factor, suffix in ((1e12, "T"), (1e9, "G" if unit == "B" else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}{unit}"
    return f"{value:.3g}{unit}"


def number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 5400:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def plan(sweep: Sweep, root: pathlib.Path) -> None:
    """Each run's parameters, tokens, FLOPs, time; what was dropped, and why; the disk that it takes."""
    console = _console()
    clock = Clock(root)
    table = _table(
        f"{sweep.name}: {len(sweep.runs)} run{'s' * (len(sweep.runs) != 1)}",
        "id", "width x layers", "params", "non-emb.", "tokens", "tok/param", "epochs", "FLOPs", "steps", "lr", "seed",
        "est. time", "",
    )  # fmt: skip
    total = 0.0
    disk, peaks = 0, []
    for run in sweep.runs:
        config, done = run.spec.config, records.read(root / run.spec.id) is not None
        seconds = clock.seconds(run.params, run.flops)
        if not done:
            total += seconds
            peaks.append(run.disk_peak)
        disk += run.disk
        table.add_row(
            run.spec.id, f"{config.model.width} x {config.model.layers}",
            count(run.params), count(run.params_non_embedding),
            count(run.tokens), f"{run.tokens / run.params:.3g}", "-" if run.epochs is None else f"{run.epochs:.2f}",
            f"{run.flops:.3g}", str(run.steps), f"{config.optim.lr:.3g}", str(config.seed), duration(seconds),
            "finished" if done else "",
        )  # fmt: skip
    console.print(table)
    for line in dict.fromkeys(_multipliers(run.spec.config) for run in sweep.runs):
        if line:
            console.print(line, highlight=False)
    for drop in sweep.dropped:
        what = ", ".join(f"{field.split('.', 1)[-1]}={value}" for field, value in drop.overrides.items())
        console.print(f"dropped ({what or 'the config'}): {drop.reason}", markup=False, highlight=False)
    console.print(
        f"{count(sum(run.flops for run in sweep.runs))} FLOP; to train: about {duration(total)} one after another "
        f"({clock.source}); disk: {count(disk, 'B')} when finished, {count(disk + max(peaks, default=0), 'B')} "
        "at most per worker",
        highlight=False,
    )


def _multipliers(config: Config) -> str:
    """What a parametrisation other than the standard one makes of a config, in a line."""
    model = config.model
    if model.parametrization == "standard":
        return ""
    model = models.with_vocabulary(model, 1)
    spec = models.registry.resolve(model)
    tree = models.rules(model, config.optim.decay_exponent)
    rules = [rule for rule in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Rule)) if rule.lr]
    rates, decays = (sorted(getattr(rule, name) for rule in rules) for name in ("lr", "decay"))

    def span(values: Sequence[float]) -> str:
        return " to ".join(f"{value:.3g}" for value in dict.fromkeys((values[0], values[-1])))

    mup, shape = model.mup, f"{model.width} x {model.layers}"
    return (
        f"{model.parametrization} {shape} from {mup.base_width} x {mup.base_layers}: learning rate "
        f"x {span(rates)}, decay of matrices x {span(decays)}, residual branches x {spec.residual_multiplier:.3g}, "
        f"logits x {spec.logits_multiplier:.3g}"
    )


def record(record: RunRecord, folder: pathlib.Path) -> None:
    console = _console()
    if record.status == "diverged":
        console.print(f"{record.id} diverged: {record.reason}", markup=False)
    else:
        error = "(one held-out document, no s.e.)" if record.loss_se is None else f"± {record.loss_se:.4f}"
        console.print(
            f"{record.id}: held-out loss {record.loss:.4f} {error} nats per token "
            f"({record.bpb:.4f} bits per byte), {count(record.params)} parameters, {count(record.tokens)} tokens, "
            f"{record.flops:.3g} FLOP, {duration(record.seconds or 0)}",
            highlight=False,
        )
    console.print(str(folder / "record.json"), highlight=False, soft_wrap=True)


def outcome(outcome: Outcome, path: pathlib.Path) -> None:
    console = _console()
    parts = {
        "trained": len(outcome.done), "finished before": len(outcome.skipped), "diverged": len(outcome.diverged),
        "failed": len(outcome.failed), "stopped": len(outcome.stopped),
    }  # fmt: skip
    console.print("sweep: " + ", ".join(f"{n} {what}" for what, n in parts.items() if n), highlight=False)
    reasons: dict[str, list[str]] = {}
    for run, reason in outcome.failed.items():
        reasons.setdefault(reason, []).append(run)
    for reason, ids in reasons.items():
        console.print(f"failed {', '.join(ids)}: {reason}", markup=False, highlight=False)
    if outcome.stopped:
        console.print("the same command goes on where this one stopped")
    console.print(str(path), highlight=False, soft_wrap=True)


def probe(summary: pd.DataFrame, task: probes.Task, trained: int) -> None:
    """Accuracy by family and size; see `probe.summary` for what is in brackets."""
    console = _console()
    sizes = sorted(set(summary["size"]))
    columns = (f"{size}{'*' if size > trained else ''}" for size in sizes)
    table = _table(
        f"{probes.spec(task)}: accuracy by {task.axis}; guessing gives {task.chance:.3g}", "family", *columns
    )
    for family, rows in summary.groupby("family", sort=False):
        numbers = zip(*(rows[name] for name in ("size", "accuracy", "low", "high")), strict=True)
        cells = {size: escape(f"{mean:.3f} [{low:.3f}, {high:.3f}]") for size, mean, low, high in numbers}
        table.add_row(str(family), *(cells.get(size, "-") for size in sizes))
    console.print(table)
    seeds = sorted(set(summary["seeds"]))
    what = "95 % interval" if seeds == [1] else f"lowest and highest of {'/'.join(map(str, seeds))} seeds"
    console.print(f"in brackets: {what}; * beyond the {trained} of training", highlight=False, markup=False)


def evaluations(run: str, found: dict[str, dict[str, Any]]) -> None:
    """What `scoring.score` found, sets and tasks apart, and the loss by how much could be seen."""
    console = _console()
    sets = {name: entry for name, entry in found.items() if "curve" in entry}
    tasks = {name: entry for name, entry in found.items() if "curve" not in entry}
    if sets:
        table = _table(f"{run}: held-out", "set@context", "loss", "± se", "bits/byte", "± se", "documents", "tokens")
        for name, entry in sets.items():
            numbers = (number(entry[what]) for what in ("loss", "loss_se", "bpb", "bpb_se"))
            table.add_row(escape(name), *numbers, str(entry["documents"]), count(entry["tokens"]))
        console.print(table)
        spans = sorted({(low, high) for entry in sets.values() for low, high, *_ in entry["curve"]})
        table = _table("loss by tokens seen", "set@context", *(f"{low}-{high}" if low < high else str(low)
                                                                for low, high in spans))  # fmt: skip
        for name, entry in sets.items():
            curve = {(low, high): loss for low, high, loss, *_ in entry["curve"]}
            table.add_row(escape(name), *(f"{curve[span]:.3f}" if span in curve else "" for span in spans))
        console.print(table)
    if tasks:
        columns = ("task", "accuracy", "± se", "per byte", "± se", "chance", "questions", "cut")
        table = _table(f"{run}: multiple choice", *columns)
        for name, entry in tasks.items():
            keys = ("accuracy", "accuracy_se", "accuracy_per_byte", "accuracy_per_byte_se", "chance")
            numbers = (number(entry[what]) for what in keys)
            table.add_row(escape(name), *numbers, str(entry["questions"]), str(entry["cut"]))
        console.print(table)


def status(path: pathlib.Path) -> None:
    """Done, running, failed with the reason, missing; and the time that the rest takes at the rate so far."""
    console = _console()
    table = _table(str(path), "id", "state", "params", "FLOPs", "step", "loss", "± se", "seconds", "note")
    states: Counter[str] = Counter()
    rates, left, corpora = [], 0.0, Corpora()
    for folder in records.run_folders(path):
        found = records.read(folder)
        line = records.last_metrics(folder)
        if found is not None:
            states[found.status] += 1
            if found.flops_per_second:
                rates.append(found.flops / (found.seconds or 1.0))
            table.add_row(
                found.id, found.status, count(found.params), f"{found.flops:.3g}", str(found.steps),
                number(found.loss), number(found.loss_se),
                f"{found.seconds or 0:.0f}", found.reason or "",
            )  # fmt: skip
            continue
        reason = failure(folder)
        state = "running" if records.is_locked(folder) else "failed" if reason else "started" if line else "missing"
        states[state] += 1
        params, compute, steps = "-", None, "-"
        if (folder / "spec.json").is_file():
            try:
                spec = RunSpec.load(folder / "spec.json")
                run = plan_run(spec.config, corpora)
                params, compute, steps = count(run.params), run.flops, str(run.steps)
                left += run.flops * (1 - (line["step"] / run.steps if line else 0))
            except BadInput as error:  # its data have gone, say: the other runs' state is no worse for it
                reason = reason or str(error)
        table.add_row(
            folder.name, state, params, f"{compute:.3g}" if compute else "-",
            f"{line['step'] if line else 0}/{steps}", number(line["loss"] if line else None), "",
            f"{line['seconds']:.0f}" if line else "", reason or "",
        )  # fmt: skip
    console.print(table)
    summary = ", ".join(f"{n} {state}" for state, n in states.items())
    eta = f"; about {duration(left / statistics.median(rates))} of training left" if left and rates else ""
    console.print(summary + eta, highlight=False)


# ------------------------------------------------------------------------------------------------ laws

METHODS = {
    "isoflop": ("loss quadratic in ln N at each budget; N* ~ C^a, D* ~ C^b", "params, tokens → loss",
                "Hoffmann et al. 2022 (arXiv 2203.15556), approach 2"),
    "envelope": ("lower envelope of training curves; N* ~ C^a, D* ~ C^b", "params, tokens, run → loss",
                 "Hoffmann et al. 2022 (arXiv 2203.15556), approach 1"),
}  # fmt: skip


def laws_known(known: Mapping[str, Any]) -> None:
    """Name, equation, columns and source of every law, and of the methods that need none."""
    console = _console()
    table = Table(title="scalelab fit TABLE --law NAME", title_justify="left", header_style="bold", box=None)
    table.add_column("name", no_wrap=True)
    for column, ratio in (("equation", 3), ("columns → target", 2), ("source", 2)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for name in sorted(known):
        law = known[name]()
        table.add_row(*map(escape, (name, law.equation, f"{', '.join(law.needs)} → {law.target}", law.source)))
    for name, row in METHODS.items():
        table.add_row(*map(escape, (name, *row)))
    console.print(table, highlight=False)


def allocation(best: Any, cost: str, title: str = "") -> None:
    """N*, D* and the target at each budget, with intervals; `best` as `Fit.optimal` gives it for a list."""
    target = next((c for c in best if c not in ("flops", "params", "tokens") and f"{c}_lower" in best), None)
    heads = ["C (FLOP)", "N*", "D* (tokens)", "D*/N*", *([target] if target else [])]
    table = _table(f"{title}{': ' * bool(title)}compute-optimal", *heads)
    for row in best.to_dict("records"):
        cells = [_between(row, name, count) for name in ("params", "tokens")]
        cells.append(f"{row['tokens'] / row['params']:.3g}" if math.isfinite(row["params"]) else "-")
        table.add_row(f"{row['flops']:.4g}", *cells, *([_between(row, target, number)] if target else []))
    _console().print(table)
    said(f"{cost}; in brackets: 95 % intervals" if best.filter(like="_lower").notna().any(axis=None) else cost)
    if best["params"].isna().any():
        said("-: the law has no interior optimum there")


def _between(row: Mapping[str, float], name: str, form: Any) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_lower", "_upper"))
    if not math.isfinite(value):
        return "-"
    return form(value) + (f" [{form(low)}, {form(high)}]" if math.isfinite(low) else "")


def findings(fit: Any) -> None:
    for notice in fit.warnings:
        said(str(notice))


def said(text: str) -> None:
    """A line of words, which may hold brackets and paths."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)
