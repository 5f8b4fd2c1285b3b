"""Training speed on this device: tokens per second and model FLOP utilisation of one step, with and without kernels.

    scalelab bench train [--params 130e6] [--families transformer,mamba2] [--kernels auto,xla] [--torch] [--profile]

A model of each family, bfloat16, on random tokens. Utilisation is FLOPs of the step by the exact convention over its
seconds, as a share of the rate of one large matrix product measured in the same run. `--torch` adds what a user would
take instead: Llama of `transformers` at the Transformer's shape, with torch.compile, SDPA and a fused AdamW, in a
process of its own before the others. Times are medians of rounds, queued and waited for once, with their range.
Operations that fell back to plain XLA are named; why, says `bench kernels --list` or the warning of a run. `--profile`
says after each where its time goes.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pallas_kernels import dispatch
from scalelab import config, flops, recipe, sharding, update
from scalelab.bench import profile
from scalelab.errors import BadInput
from scalelab.schema import choice

VOCABULARY = 32768


@dataclass(frozen=True)
class Tokens:
    """What a trainer asks of a corpus: the token that begins a document does not occur."""

    vocab_size: int = VOCABULARY
    bos: int = -1


@dataclass(frozen=True)
class Row:
    family: str
    kernels: str
    parameters: int
    seconds: float
    spread: float
    tokens: int  # of a step
    flops: float  # of a step
    memory: float  # bytes of the compiled step beside its arguments
    plain: tuple[str, ...] = ()  # operations passed over for plain XLA
    note: str = ""


def main(
    params: float, families: Sequence[str], kernels: Sequence[str], rows: int, seq_len: int, torch: bool, packed: bool,
    profiled: bool = False,
) -> int:  # fmt: skip
    names = list(families) or list(recipe.FAMILIES)
    for family in names:
        recipe.shape(family, 64)
    for name in kernels:
        choice("--kernels", name, dispatch.KERNELS)
    console = Console(stderr=True)
    found = [peer(params, rows, seq_len)] if torch else []
    peak = matmul_rate()
    for family in track(names, "measuring", console=console, transient=True):
        for name in kernels:
            found.append(measured(family, name, params, rows, seq_len, packed))
            console.print(line(found[-1], peak))
            if profiled and not found[-1].note:
                breakdown(family, name, params, rows, seq_len, packed)
    report(found, peak)
    return 0


def settings(family: str, params: float, rows: int, seq_len: int) -> Any:
    return config.override(
        config.base(),
        {**recipe.sized(family, params), "model.vocab_size": VOCABULARY,
         "data.seq_len": seq_len, "data.batch_size": rows},
    )  # fmt: skip


def prepared(
    family: str, kernels: str, params: float, rows: int, seq_len: int, packed: bool, dtype: str = "bfloat16"
) -> tuple[update.Trainer, Any]:
    """(trainer, a batch)."""
    changes = {"kernels": kernels, "data.document_mask": packed, "model.compute_dtype": dtype}
    conf = config.override(settings(family, params, rows, seq_len), changes).lock()
    trainer = update.Trainer(conf, Tokens())  # pyright: ignore[reportArgumentType]
    data = np.random.default_rng(0).integers(1, VOCABULARY, size=(rows, seq_len + 1), dtype=np.int32)
    return trainer, sharding.put_rows(data, trainer.mesh)


def measured(family: str, kernels: str, params: float, rows: int, seq_len: int, packed: bool) -> Row:
    trainer, data = prepared(family, kernels, params, rows, seq_len, packed)
    parameters = flops.counts(trainer.model)
    work = flops.per_token(trainer.model, seq_len).training * rows * seq_len
    row = {
        "family": family, "kernels": kernels, "tokens": rows * seq_len, "flops": work,
        "parameters": parameters.active - parameters.embedding - parameters.unembedding,
    }  # fmt: skip
    rate = np.float32(1e-4)
    try:
        with warnings.catch_warnings(), dispatch.listening() as heard:
            warnings.simplefilter("ignore")
            state: Any = trainer.initial_state()
            step = trainer.step.lower(state, data, rate).compile()
            held: Any = [state]

            def run() -> Any:
                held[0], metrics = step(held[0], data, rate)
                return metrics

            seconds, spread = median_seconds(run, least=round_seconds())
            memory = step.memory_analysis()
            if kernels != "xla" and dispatch.device().platform != "cpu":
                fallen = {op for op, choice in heard if choice.implementation == "xla" and choice.passed_over}
                row["plain"] = tuple(sorted(fallen))
    except Exception as error:  # a family that fails is a row of the table, not the end of the run
        return Row(**row, seconds=np.nan, spread=np.nan, memory=np.nan, note=note_of(error))
    finally:
        held = state = None
        gc.collect()
    return Row(**row, seconds=seconds, spread=spread, memory=getattr(memory, "temp_size_in_bytes", np.nan))


def note_of(error: Exception) -> str:
    """Its first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def breakdown(
    family: str, kernels: str, params: float, rows: int, seq_len: int, packed: bool, shown: int = 30
) -> None:  # fmt: skip
    """Prints where the time of a step goes."""
    trainer, data = prepared(family, kernels, params, rows, seq_len, packed)
    state: Any = trainer.initial_state()
    rate = np.float32(1e-4)
    # Not captured in CUDA graphs, which the profiler sees as one.
    options: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 10**6}
    step = trainer.step.lower(state, data, rate).compile(compiler_options=options)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, data, rate)
        return metrics

    found = profile.profiled(step, run)
    kinds: Any = found.groupby("kind")["ms"].sum()
    kinds = kinds.sort_values(ascending=False)
    table = Table(
        title=f"{family} ({kernels}), ms a step: "
        + ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.items())
        + f"; the {shown} largest",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for column in ("kind", "what", "writes"):
        table.add_column(column, no_wrap=True)
    for column in ("times", "ms", "GB", "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    row: Any
    for row in found.head(shown).itertuples():
        what = row.what if len(row.what) <= 48 else "..." + row.what[-45:]
        table.add_row(
            row.kind, what, row.shape[:60], f"{row.times:.0f}", f"{row.ms:.3f}", f"{row.gb:.2f}",
            f"{row.gb / row.ms * 1e3:,.0f}" if row.ms else "",
        )  # fmt: skip
    out = Console()
    (out if out.is_terminal else Console(width=150)).print(table)


def median_seconds(run: Callable[[], Any], rounds: int = 7, least: float = 0.2) -> tuple[float, float]:
    """(median, range) of seconds of a call, rounds of at least `least` seconds each, queued and waited for once."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    calls = max(1, round(least / max(time.perf_counter() - began, 1e-6)))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / calls)
    return float(np.median(times)), float(np.ptp(times))


def round_seconds() -> float:
    """Of a round of steps. Once a round the device waits for the host, 13 ms for a step of 1,800 kernels whose graphs
    it has to update: in 0.2 s, three steps, that is a twentieth. In training, whose steps are queued, it is nothing."""
    return 0.2 if jax.default_backend() == "cpu" else 1.0


def matmul_rate() -> float:
    """FLOP/s of one large product in bfloat16."""
    n = 8192 if jax.default_backend() != "cpu" else 512
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / median_seconds(lambda: product(a, b))[0]


def line(row: Row, peak: float) -> str:
    if row.note:
        return f"{row.family} ({row.kernels}): {row.note}"
    return (
        f"{row.family} ({row.kernels}): {1e3 * row.seconds:.1f} ms, {row.tokens / row.seconds:,.0f} tokens/s, "
        f"{row.flops / row.seconds / peak:.1%} of the peak"
    ) + (f"; plain XLA: {', '.join(row.plain)}" if row.plain else "")


def report(found: list[Row], peak: float) -> None:
    out = Console()
    table = Table(
        title=f"Training steps, bfloat16; utilisation of {peak / 1e12:.3g} TFLOP/s measured here "
        f"({jax.devices()[0].device_kind})",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("family", no_wrap=True)
    table.add_column("kernels", no_wrap=True)
    plain = any(r.plain for r in found)
    for column in ("parameters", "ms", "range", "tokens/s", "utilisation", "over Transformer", "temporary GB"):
        table.add_column(column, justify="right", no_wrap=True)
    if plain:
        table.add_column("plain XLA")
    base = next((r.flops / r.seconds for r in found if r.family == "transformer"), np.nan)
    for r in found:
        if r.note:
            table.add_row(r.family, r.kernels, f"{r.parameters:,}", r.note)
            continue
        rate = r.flops / r.seconds
        table.add_row(
            r.family, r.kernels, f"{r.parameters:,}", f"{1e3 * r.seconds:.1f}", f"{1e3 * r.spread:.1f}",
            f"{r.tokens / r.seconds:,.0f}", f"{rate / peak:.1%}", f"{rate / base:.2f}", f"{r.memory / 1e9:.1f}",
            *((", ".join(r.plain),) if plain else ()),
        )  # fmt: skip
    (out if out.is_terminal else Console(width=140)).print(table)


# ------------------------------------------------------------------------------------ the peer


def peer(params: float, rows: int, seq_len: int) -> Row:
    """Llama of `transformers` at the Transformer's shape."""
    model = settings("transformer", params, rows, seq_len).model
    shape = {
        "width": model.width, "layers": model.layers, "heads": model.attention.heads,
        "kv_heads": model.attention.kv_heads, "head_dim": model.attention.head_dim, "hidden": model.mlp.hidden,
        "vocabulary": VOCABULARY, "tied": model.tied_embeddings, "rows": rows, "seq_len": seq_len,
        "round": round_seconds(),
    }  # fmt: skip
    command = [sys.executable, "-m", "scalelab.bench.torch_llama", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    work = flops.per_token(model, seq_len).training * rows * seq_len
    parameters = flops.counts(model)
    row = {
        "family": "Llama", "kernels": "torch", "tokens": rows * seq_len, "flops": work,
        "parameters": parameters.active - parameters.embedding - parameters.unembedding,
    }  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BadInput("--torch", "transformers' Llama", f"did not run: {said}")
    times = json.loads(done.stdout.splitlines()[-1])
    return Row(**row, seconds=times["seconds"], spread=times["spread"], memory=times["memory"])
