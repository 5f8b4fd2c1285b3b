"""The operations of pallas_kernels on this device: which implementation runs, how right it is, how fast and how small.

    scalelab bench kernels --list [--families mamba2,xlstm --params 350e6 --rows 8 --seq-len 2048]
    scalelab bench kernels [--ops grouped_matmul,mlstm] [--torch]

First every implementation that runs here is compared with the definition, in float32, on fresh random inputs of the
same shape but for one row of the batch, of at most 1,024 tokens where the definition keeps a state for each: ||x -
want|| / ||want||, the outputs and the worst of all gradients. Then the forward pass, and the forward pass with all
gradients under a random cotangent, are timed: medians of rounds queued and waited for once. Times are given over those
of a baseline in the same run (`xla`, the plain form; for what has a common way of its own that, the `reference`), and
as the share of them that the floor is: the larger of FLOPs over the rate of a large matrix product and bytes over that
of a large copy, both measured first. `--torch` adds PyTorch's own operations, in a process before. On a CPU the shapes
are small. An error beyond `LIMITS` is marked, and the exit status 1.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import dispatch
from scalelab.bench import cases, throughput
from scalelab.bench.throughput import matmul_rate, median_seconds, note_of
from scalelab.errors import BadInput
from scalelab.schema import choice as choice_of

LIMITS = 1e-2, 2e-2  # of outputs, of gradients: four times what bfloat16's rounding makes of the worst


@dataclass(frozen=True)
class Seen:
    """Of one implementation at one shape; seconds and bytes."""

    op: str
    case: str
    kernels: str
    error: float  # of the outputs
    gradient_error: float  # the worst
    forward: float
    both: float
    spread: float  # range of `both`
    memory: float  # temporary, of `both`
    floor: tuple[float, float]  # least seconds of forward, both
    note: str = ""
    checked: bool = True  # against the definition: not a peer's

    @property
    def wrong(self) -> bool:
        right = self.error <= LIMITS[0] and self.gradient_error <= LIMITS[1]  # NaN is not
        return self.checked and not self.note and not right

    def __str__(self) -> str:
        errors = f"errors {self.error:.1e}, {self.gradient_error:.1e}"
        times = f"{1e3 * self.forward:.3f} and {1e3 * self.both:.3f} ms (range {1e3 * self.spread:.3f})"
        return (
            f"{self.op} {self.case}, {self.kernels}: {self.note or f'{errors}; {times}; {self.memory / 1e6:,.0f} MB'}"
        )


def main(ops: Sequence[str], listing: bool, torch: bool, dtype: str) -> int:
    for op in ops:
        if op not in cases.OPS:
            raise BadInput("--ops", op, f"must be of {', '.join(cases.OPS)}")
    choice_of("--dtype", dtype, ("bfloat16", "float16", "float32"))
    wanted = [case for case in cases.all_cases(dispatch.device().platform, dtype) if not ops or case.op in ops]
    if listing:
        return list_choices(wanted, dtype)
    if torch and dtype != "bfloat16":
        raise BadInput("--dtype", dtype, "must be bfloat16 beside --torch, whose operations are timed in it")
    peers = peer_times(wanted) if torch else []
    rates = matmul_rate(), copy_rate()
    console = Console(stderr=True)
    seen = []
    for case in wanted:
        for kernels in runnable(case):
            seen.append(measured(case, kernels, rates))
            console.print(
                str(seen[-1]), highlight=False, soft_wrap=True
            )  # at once: a run cut short keeps what it measured
    report(seen, peers, rates)
    return 1 if any(row.wrong or row.note for row in seen) else 0


# ------------------------------------------------------------------------------------ which


def choices(case: cases.Case) -> dict[str, dispatch.Choice]:
    """What `dispatch` says under "auto" of a case's operation and of its parts, from shapes alone."""
    with dispatch.listening() as heard:
        jax.eval_shape(lambda *a: case.run("auto")(*a), *case.shapes)
    return {op: found for op, found in heard if op == case.op} | dict(heard)


def runnable(case: cases.Case) -> Iterator[str]:
    """The baseline and the plain form, what waits for its first measurement here, and what "auto" takes where that is
    another."""
    found = choices(case)
    yield from dict.fromkeys((case.baseline, "xla"))
    passed_over = [pair for choice in found.values() for pair in choice.passed_over]
    yield from (waiting := dict.fromkeys(name for name, reason in passed_over if reason == dispatch.NOT_MEASURED))
    if (chosen := found[case.op].implementation) != "xla":
        yield "auto" if chosen in waiting else chosen  # by its name it would be with the part that waits


def list_choices(wanted: Sequence[cases.Case], dtype: str) -> int:
    return print_choices(
        ("operation", "shape"), dtype,
        [
            (op, case.name if op == case.op else f"a part of {case.op}", found)
            for case in wanted for op, found in choices(case).items()
        ],
    )  # fmt: skip


def list_families(families: Sequence[str], params: float, rows: int, seq_len: int, dtype: str) -> int:
    """What a training step of each family, of the recipe's shape, takes."""
    found = []
    for family in families:
        trainer, data = throughput.prepared(family, "auto", params, rows, seq_len, packed=False, dtype=dtype)
        with dispatch.listening() as heard:
            jax.eval_shape(trainer.step, trainer.abstract, data, np.float32(1e-4))
        taken: dict[tuple[str, str], dispatch.Choice] = {}
        for op, chosen in heard:  # once chosen, a form may be named in the calls: the first says why
            taken.setdefault((op, chosen.implementation), chosen)
        found += [(family, op, chosen) for (op, _), chosen in taken.items()]
    return print_choices(("family", "operation"), dtype, found)


def print_choices(columns: tuple[str, str], dtype: str, rows: Sequence[tuple[str, str, dispatch.Choice]]) -> int:
    title = f"Implementations on {dispatch.device().kind}, operands in {dtype}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in (*columns, "runs"):
        table.add_column(column, no_wrap=True)
    table.add_column("why not a faster one")
    for *what, found in rows:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.passed_over)
        plain = "" if found.implementation != "xla" else "plain JAX is all that it has"
        table.add_row(*what, found.implementation, why or plain)
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table)
    return 0


# ------------------------------------------------------------------------------------ how right, how fast


def measured(case: cases.Case, kernels: str, rates: tuple[float, float]) -> Seen:
    floor = tuple(max(f / rates[0], b / rates[1]) for f, b in (case.cost, case.cost_both))
    row = {"op": case.op, "case": case.name, "kernels": kernels, "floor": floor}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dispatch.Fallback)
            error, gradient_error = errors(case, kernels)
            arrays = case.draw(jax.random.key(1))
            run = case.run(kernels)
            forward = jax.jit(run).lower(*arrays).compile()
            first, _ = median_seconds(lambda: forward(*arrays))
            cotangents = cases.like(jax.eval_shape(run, *arrays), jax.random.key(2))
            both = jax.jit(value_and_pull(run)).lower(cotangents, *arrays).compile()
            second, spread = median_seconds(lambda: both(cotangents, *arrays))
            memory = both.memory_analysis()
    except Exception as problem:  # one that fails is a row of the table, not the end of the run
        nan, note = float("nan"), note_of(problem)
        return Seen(**row, error=nan, gradient_error=nan, forward=nan, both=nan, spread=nan, memory=nan, note=note)
    finally:
        gc.collect()
    temporary = float(getattr(memory, "temp_size_in_bytes", np.nan))
    return Seen(
        **row, error=error, gradient_error=gradient_error, forward=first, both=second, spread=spread, memory=temporary
    )  # fmt: skip


def value_and_pull(run: Callable[..., Any]) -> Callable[..., Any]:
    """(cotangents, *arrays) -> (outputs, gradients of the arrays that have one)."""

    def both(cotangents: Any, *arrays: Any) -> Any:
        exact = [i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]

        def of(*some: Any) -> Any:
            full = list(arrays)
            for i, a in zip(exact, some, strict=True):
                full[i] = a
            return run(*full)

        out, pull = jax.vjp(of, *(arrays[i] for i in exact))
        return out, pull(cotangents)

    return both


def errors(case: cases.Case, kernels: str) -> tuple[float, float]:
    """Against the definition in float32, on one row of a batch."""
    arrays = case.draw_small(jax.random.key(np.random.default_rng().integers(2**31)))
    run = jax.jit(value_and_pull(case.run(kernels)))
    cotangents = cases.like(jax.eval_shape(case.run(kernels), *arrays), jax.random.key(3))
    exact = [a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
    got = run(cotangents, *arrays)
    with jax.default_matmul_precision("highest"):
        definition = jax.jit(value_and_pull(case.run("reference")))
        want = definition(jax.tree.map(lambda a: a.astype(jnp.float32), cotangents), *exact)
    gaps = [jax.tree.leaves(jax.tree.map(gap, a, b)) for a, b in zip(got, want, strict=True)]
    return float(np.max(gaps[0])), float(np.max(gaps[1]))  # NaN, which Python's max passes over, where one is


def gap(a: Any, b: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def copy_rate() -> float:
    """Bytes per second, read and written, of a large copy."""
    n = 2**29 if jax.default_backend() != "cpu" else 2**24
    x = jnp.arange(n, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 8 * n / median_seconds(lambda: copy(x))[0]


# ------------------------------------------------------------------------------------ the table


def peer_times(wanted: Sequence[cases.Case]) -> list[Seen]:
    """PyTorch's operations at the shapes of the cases, where it has them."""
    asked = [case.peer for case in wanted if case.peer]
    command = [sys.executable, "-m", "scalelab.bench.torch_ops", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BadInput("--torch", "PyTorch's operations", f"did not run: {said}")
    nan, rows = float("nan"), json.loads(done.stdout.splitlines()[-1])
    return [
        Seen(
            case.op,
            case.name,
            name,
            nan,
            nan,
            times["forward"],
            times["both"],
            times["spread"],
            nan,
            (nan, nan),
            checked=False,
        )
        for case, found in zip([case for case in wanted if case.peer], rows, strict=True)
        for name, times in found.items()
    ]


def report(seen: Sequence[Seen], peers: Sequence[Seen], rates: tuple[float, float]) -> None:
    table = Table(
        title=f"{dispatch.device().kind}: {rates[0] / 1e12:.3g} TFLOP/s in a large product, {rates[1] / 1e9:.4g} GB/s "
        "in a large copy; times in ms, over the baseline's, and the floor's share of them",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for column in ("operation", "shape", "runs"):
        table.add_column(column, no_wrap=True)
    for column in (
        "error", "of gradients", "forward", "over", "floor", "with gradients", "range", "over", "floor", "MB"
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    base = {}
    for row in seen:  # the baseline comes first
        base.setdefault((row.op, row.case), row)
    for row in sorted([*seen, *peers], key=lambda row: list(base).index((row.op, row.case))):
        if row.note:
            table.add_row(row.op, row.case, row.kernels, "failed")
            continue
        plain = base[row.op, row.case]
        cells = [f"{row.error:.1e}", f"{row.gradient_error:.1e}" + (" wrong" if row.wrong else "")]
        for time, of, floor in (
            (row.forward, plain.forward, row.floor[0]), (row.both, plain.both, row.floor[1]),
        ):  # fmt: skip
            cells += [f"{1e3 * time:.3f}", f"{time / of:.2f}", f"{floor / time:.0%}" if floor == floor else ""]
        cells.insert(6, f"{1e3 * row.spread:.3f}")
        table.add_row(row.op, row.case, row.kernels, *cells, f"{row.memory / 1e6:,.0f}")
    out = Console()
    out = out if out.is_terminal else Console(width=190)
    out.print(table)
    for row in (row for row in seen if row.note):
        out.print(f"failed: {row}", highlight=False)
