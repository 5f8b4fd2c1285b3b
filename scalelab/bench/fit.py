"""Fitting a law: this library beside what the field does, in one run.

    scalelab bench fit            4,500 starts timed on random subsets and scaled
    scalelab bench fit --whole    and once in full (a minute or two)

The field (Hoffmann et al. 2022; Besiroglu et al. 2024's notebook): SciPy's L-BFGS-B as it comes, gradients by
differences, from each point of a grid of 4,500 starts; then BFGS with a gradient from the fit for each bootstrap
resample. Both minimise the sum of Huber (1e-3) losses of ln L under L = E + A / N^alpha + B / D^beta.

Times are CPU seconds, which other work on the machine disturbs least; both sides run on one thread (the command tells
BLAS so: SciPy's is ten times slower where its threads fight for cores). Each pair of timings is taken one after the
other, so that a machine whose speed drifts slows both alike; medians with the range over repeats.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

import scalelab
from scalelab import laws
from scalelab.laws.objective import HUBER, SQUARES
from scalelab.laws.powersum import GRID
from scalelab.laws.progress import progress
from scalelab.laws.search import AGREE, polish
from scalelab.laws.solver import minimise

DELTA = 1e-3
HOFFMANN = tuple(
    itertools.product(  # a = ln A, b = ln B, e = ln E, alpha, beta
        np.arange(0, 30, 5.0), np.arange(0, 30, 5.0), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5),
        np.arange(0, 2.5, 0.5),
    )
)  # fmt: skip
DRAWS = 1000
SPREAD = 8  # starts of each resample, in the check that its refit is at its own optimum
ROOT = pathlib.Path(scalelab.__file__).parents[1]

FIRST = """
import sys, time, pandas as pd
from scalelab import laws
table = pd.read_json(sys.stdin)
began = time.perf_counter()
laws.fit("chinchilla", table, bootstrap=0)
print(time.perf_counter() - began)
"""
MEMORY = """
import resource, sys
import numpy as np
from scalelab import laws
rng = np.random.default_rng(0)
N, D = np.exp(rng.uniform(17, 24, 100_000)), np.exp(rng.uniform(21, 28, 100_000))
L = (1.7 + 400 / N**0.34 + 1200 / D**0.37) * np.exp(0.01 * rng.standard_normal(100_000))
laws.fit("chinchilla", {"params": N, "tokens": D, "loss": L}, bootstrap=int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main(repeats: int = 7, whole: bool = False, starts: int = 40, refits: int = 40) -> int:
    """`starts` and `refits`: how many of SciPy's 4,500 and 1,000 are timed in each repeat."""
    out = Console(width=130)
    report = Table("", "scalelab", "SciPy, as the field fits", "ratio", "goal", title="medians (range)")
    tables, where = chinchilla_rows()
    with progress(repeats * len(tables), "bench fit") as advance:
        for table in tables:
            against_scipy(report, table, repeats, starts, refits, whole, advance)
    first = [fresh(FIRST, str(tables[0].to_json())) for _ in range(repeats)]
    report.add_row("first fit in a fresh process, wall", _spread(first, "s"), "", "", "<= 0.3 s")
    user_defined(report, tables[0], repeats)
    farseer(report)
    few, more = fresh(MEMORY, "", "12"), fresh(MEMORY, "", "36")
    report.add_row(
        "peak memory, 100,000 rows",
        f"{few:.0f} MiB at 12 draws, {more:.0f} MiB at 36",
        f"{1e5 * 1e4 * 8 / 2**20:.0f} MiB for the counts of 10,000",
        "",
        "does not grow with the draws",
    )
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "any number of")
    out.print(f"rows: {where}; {repeats} repeats, interleaved; CPU seconds, {threads} BLAS thread(s)")
    out.print(
        f"SciPy's times are of {starts} random starts of {len(HOFFMANN):,} and {refits} resamples of {DRAWS:,} in each "
        "repeat, scaled up" + ("; the whole grid was timed once" if whole else "; --whole times the grid in full")
    )
    out.print(report)
    return 0


def chinchilla_rows() -> tuple[list[pd.DataFrame], str]:
    """The 240 and 245 rows of Epoch AI's reading of Hoffmann et al.'s figure 4, or planted ones."""
    folder = pathlib.Path(os.environ.get("SCALELAB_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "chinchilla_epoch" / "points.csv"
    if path.is_file():
        table = pd.read_csv(path).rename(columns={"tokens_derived": "tokens"})
        where = f"Chinchilla's, from {path.name}"
    else:
        rng = np.random.default_rng(0)
        params, tokens = np.exp(rng.uniform(18, 23.5, 245)), np.exp(rng.uniform(20, 26, 245))
        loss = (1.8 + 480 / params**0.35 + 2100 / tokens**0.37) * np.exp(0.01 * rng.standard_t(3, 245))
        table = pd.DataFrame({"params": params, "tokens": tokens, "loss": loss})
        where = "PLANTED (set SCALELAB_DATA to the folder with chinchilla_epoch/points.csv for the published ones)"
    table = table.loc[:, ["params", "tokens", "loss"]]
    return [table.sort_values("loss").head(240).sort_index(), table], where


# ------------------------------------------------------------------------------------------------ the field's way


class Field:
    """The objective as the notebooks have it, in (ln A, ln B, ln E, alpha, beta)."""

    def __init__(self, table: pd.DataFrame):
        self.x, self.y, self.target = (np.log(table[c].to_numpy()) for c in ("params", "tokens", "loss"))

    def value(self, theta: Float[np.ndarray, " 5"], counts: Float[np.ndarray, " n"] | float = 1.0) -> float:
        a, b, e, alpha, beta = theta
        model = np.log(np.exp(a - alpha * self.x) + np.exp(b - beta * self.y) + np.exp(e))
        residual = model - self.target
        size = np.abs(residual)
        return float(np.sum(counts * np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))))

    def gradient(self, theta: Float[np.ndarray, " 5"], counts: Float[np.ndarray, " n"]) -> Float[np.ndarray, " 5"]:
        a, b, e, alpha, beta = theta
        terms = np.stack([np.exp(a - alpha * self.x), np.exp(b - beta * self.y), np.full_like(self.x, np.exp(e))])
        total = terms.sum(0)
        slope = counts * np.clip(np.log(total) - self.target, -DELTA, DELTA)
        p, q, r = terms / total
        return np.array([slope @ p, slope @ q, slope @ r, -slope @ (p * self.x), -slope @ (q * self.y)])

    def search(self, start: Any) -> tuple[float, np.ndarray]:
        with np.errstate(all="ignore"):
            found = minimize(self.value, np.array(start), method="L-BFGS-B")
        return (float(found.fun) if np.isfinite(found.fun) else np.inf), found.x

    def refit(self, counts: np.ndarray, start: np.ndarray) -> np.ndarray:
        return minimize(self.value, start, args=(counts,), jac=self.gradient, method="BFGS").x

    @staticmethod
    def params(theta: np.ndarray) -> np.ndarray:
        """E, A, B, alpha, beta."""
        return np.concatenate([np.exp(theta[..., [2, 0, 1]]), theta[..., 3:]], axis=-1)


def against_scipy(
    report: Table, table: pd.DataFrame, repeats: int, starts: int, refits: int, whole: bool,
    advance: Callable[[float], None],
) -> None:  # fmt: skip
    n, field, rng = len(table), Field(table), np.random.default_rng(0)
    picked = np.random.default_rng(1).integers(n, size=(DRAWS, n))
    counts = np.stack([np.bincount(row, minlength=n) for row in picked]).astype(float)

    def ours(bootstrap: Any) -> laws.Fit:
        return laws.fit("chinchilla", table, bootstrap=bootstrap)

    fit = ours(picked)
    found = min((field.search(HOFFMANN[i]) for i in rng.choice(len(HOFFMANN), starts)), key=lambda f: f[0])
    theirs = field.refit(np.ones(n), found[1])
    times: dict[str, list[float]] = {"grid": [], "fit": [], "BFGS": [], "draws": []}
    drawn: dict[int, np.ndarray] = {}
    for _ in range(repeats):
        some = rng.choice(len(HOFFMANN), starts, replace=False)
        lanes = rng.choice(DRAWS, refits, replace=False)
        times["grid"].append(_seconds(lambda some=some: [field.search(HOFFMANN[i]) for i in some]) * 4500 / starts)
        times["fit"].append(float(np.median([_seconds(lambda: ours(0)) for _ in range(5)])))
        began = time.process_time()
        drawn |= {int(i): field.refit(counts[i], theirs) for i in lanes}
        times["BFGS"].append((time.process_time() - began) * DRAWS / refits)
        times["draws"].append(_seconds(lambda: ours(picked)) - times["fit"][-1])
        advance(1)
    grid, fits, bfgs, draws = (np.array(v) for v in times.values())
    label = f"{n} rows: "
    report.add_row(label + "point fit, warm", _spread(fits, "ms"), _spread(grid, "s"), _ratio(grid, fits), ">= 3,000")
    if whole:
        began = time.process_time()
        found = min((field.search(start) for start in HOFFMANN), key=lambda f: f[0])
        seconds = time.process_time() - began
        ratio = f"{seconds / np.median(fits):,.0f}"
        report.add_row(label + "point fit, all 4,500 starts", "", f"{seconds:.1f} s", ratio, ">= 3,000")
    report.add_row(label + "1,000 refits", _spread(draws, "ms"), _spread(bfgs, "s"), _ratio(bfgs, draws), ">= 20")
    best = min(found[0], field.value(theirs), fit.record["value"], many_starts(fit, np.ones((1, n)), 64)[0])
    report.add_row(
        label + "objective over the best known",
        f"{fit.record['value'] / best - 1:.1e}",
        f"{found[0] / best - 1:.1e}" + ("" if whole else f" (best of {starts} starts)"),
        "",
        "<= 1e-9",
    )
    lanes = np.array(sorted(drawn))
    own = values(fit, fit.samples[lanes], counts[lanes])
    other = values(fit, field.params(np.stack([drawn[i] for i in lanes])), counts[lanes])
    optimum = np.minimum(np.minimum(own, other), many_starts(fit, counts[lanes], SPREAD))
    report.add_row(
        label + "refits at their own optimum",
        f"{np.mean(own <= optimum * (1 + AGREE)):.1%} of {len(lanes)}",
        f"{np.mean(other <= optimum * (1 + AGREE)):.1%}",
        "",
        "100 %",
    )


def values(fit: laws.Fit, params: Float[np.ndarray, "R 5"], counts: Float[np.ndarray, "R n"]) -> np.ndarray:
    """The objective of each row of parameters under its own counts."""
    columns = fit.rows.columns
    residual = np.log(fit.law.evaluate(params, columns)) - np.log(columns["loss"])
    return (counts * HUBER.rho(residual)[0]).sum(1)


def many_starts(fit: laws.Fit, counts: Float[np.ndarray, "R n"], spread: int) -> Float[np.ndarray, " R"]:
    """The least objective of each row of counts from `spread` starts of its own."""
    problem: Any = fit.solved[0]
    starts = problem.grid_starts(counts, GRID, 8)[:, :spread].reshape(-1, 5)
    repeated = np.repeat(counts, len(starts) // len(counts), axis=0)
    lead = minimise(problem, starts, repeated, HUBER.widened(10), tolerance=1e-4, max_iterations=30)
    return minimise(problem, lead.theta, repeated, HUBER).value.reshape(len(counts), -1).min(1)


# ------------------------------------------------------------------------------------------------ the rest


def user_defined(report: Table, table: pd.DataFrame, repeats: int) -> None:
    """The same law written down by a user, in ten lines."""
    mine = laws.define(
        "mine",
        lambda p, x: p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.beta,
        inputs=("params", "tokens"),
        E=laws.positive(0.1, 10, linear=True),
        A=laws.positive(1, 1e5, linear=True),
        B=laws.positive(1, 1e5, linear=True),
        alpha=laws.free(0.05, 1.5),
        beta=laws.free(0.05, 1.5),
    )
    for label, bootstrap in (("point fit", 0), ("1,000 refits", DRAWS)):
        own, built_in = (
            np.array([_seconds(lambda law=law, b=bootstrap: law.fit(table, bootstrap=b)) for _ in range(repeats)])
            for law in (mine, laws.Chinchilla())
        )
        ratio = f"{_ratio(own, built_in)} x built-in"
        report.add_row(f"user-defined law: {label}", _spread(own, "ms"), "", ratio, "<= 3 x")


def farseer(report: Table) -> None:
    """How many of 200 random starts reach the best sum of squares on the authors' runs."""
    label = "Farseer: random starts at the best fit"
    path = pathlib.Path(os.environ.get("SCALELAB_DATA", ROOT.parent / "shared" / "data")) / "farseer" / "points.csv"
    if "farseer" not in laws.available() or not path.is_file():
        why = "no such law" if "farseer" not in laws.available() else f"no {path.name}: set SCALELAB_DATA"
        report.add_row(label, f"SKIPPED ({why})", "", "", ">= 80 %")
        return
    table = pd.read_csv(path).rename(columns={"params_non_embedding": "params", "bpc": "loss"})
    fit = laws.fit("farseer", table, bootstrap=0)
    problem: Any = fit.solved[0]
    base, weights = problem.base, fit.rows.weights
    drawn = base.settle(base.draw(np.random.default_rng(0).random((200, 6))), weights, SQUARES)
    found = polish(problem, drawn[:, problem.keep], weights, SQUARES)
    share = np.mean(found.value <= found.value.min() * (1 + AGREE))
    residual = fit.law.evaluate(fit.estimate[None], {r: table[r].to_numpy() for r in ("params", "tokens")})
    squares = float(((residual - table.loss.to_numpy()) ** 2).sum())
    report.add_row(label, f"{share:.1%} of 200", "", "", ">= 80 %")
    report.add_row("Farseer: sum of squares, 404 rows", f"{squares:.4g}", "", "", "<= 3.95e-4")


def fresh(code: str, text: str, *argv: str) -> float:
    """What a program prints in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], input=text, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    return float(done.stdout)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _spread(seconds: Any, unit: str) -> str:
    scaled = np.asarray(seconds) * (1e3 if unit == "ms" else 1)
    return f"{np.median(scaled):.3g} ({scaled.min():.3g} to {scaled.max():.3g}) {unit}"


def _ratio(theirs: np.ndarray, ours: np.ndarray) -> str:
    ratio = theirs / ours
    digits = ",.0f" if np.median(ratio) >= 100 else ",.2g"
    return f"{np.median(ratio):{digits}} ({ratio.min():{digits}} to {ratio.max():{digits}})"
