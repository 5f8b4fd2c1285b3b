"""The training loop, readable top to bottom.

The step itself is `update.py`. Its metrics are read after the next one is under way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import platform
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import dispatch
from scalelab import data, flops, optim, records, sharding, start
from scalelab.checkpoint import Checkpoints
from scalelab.config import RunSpec, validate
from scalelab.errors import BadInput
from scalelab.evaluate import Evaluator
from scalelab.host import (
    git_state,
    keep_freed_memory,
    peak_flops,
    peak_memory,
    stop_signal,
    use_compilation_cache,
    utc,
    versions,
)
from scalelab.paths import remove_leftovers, write_atomically
from scalelab.records import RunRecord
from scalelab.track import MetricsFile, Sink, optional_sinks, say
from scalelab.update import Trainer, TrainState


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT), has saved itself and can go on later."""

    def __init__(self, step: int, steps: int):
        super().__init__(f"stopped after step {step} of {steps}; the same command resumes it")
        self.step = step


# ------------------------------------------------------------------------------------------------ one run


def run(spec: RunSpec, runs: str | os.PathLike[str] | None = None, sinks: Sequence[Sink] = ()) -> RunRecord:
    """Trains a run to its end, from wherever an earlier attempt left it, and returns its record.

    A finished run is not trained again. Raises `Stopped` when asked to stop, `BadInput` for what the user can mend;
    any other failure leaves `failure.json` with the reason and the traceback, and the run can be taken up again.
    """
    folder = pathlib.Path(runs if runs is not None else spec.config.runs) / spec.id
    record = records.read(folder)
    if record is not None:
        return record
    if jax.process_count() > 1:
        raise BadInput(
            "jax.process_count()", jax.process_count(), "a run is trained by one process, on all its devices"
        )
    validate(spec.config)
    if (reason := dispatch.lacking(spec.config.kernels)) and not dispatch.interpret():
        raise BadInput("config.kernels", spec.config.kernels, reason)
    use_compilation_cache()
    keep_freed_memory()
    corpus = data.open(spec.config.data)
    content = start.content(spec.config, corpus)
    if content != dict(spec.content):
        what = "start" if content.get(start.CONTENT) != spec.content.get(start.CONTENT) else "data"
        raise BadInput("spec.content", spec.content, f"the {what} has changed since the run was planned: {content}")
    trainer = Trainer(spec.config, corpus)  # everything that can be refused is refused before the folder exists
    with records.run_lock(folder):
        with contextlib.suppress(FileNotFoundError):
            (folder / "failure.json").unlink()
        remove_leftovers(folder, ("attempts.json", "metrics.jsonl", "record.json", "failure.json"))
        write_atomically(folder / "spec.json", spec.to_json())
        try:
            return Attempt(spec, folder, corpus, trainer).run(sinks)
        except Exception as error:
            if not isinstance(error, Stopped | BadInput):
                write_failure(folder, error)
            raise


class Attempt:
    """One start of a run: resume, loop, finish."""

    def __init__(self, spec: RunSpec, folder: pathlib.Path, corpus: data.Corpus, trainer: Trainer):
        self.began = time.perf_counter()
        self.started = utc()
        self.spec, self.config, self.folder = spec, spec.config, folder
        self.corpus, self.trainer = corpus, trainer
        self.steps = self.config.train.steps
        self.step_times: list[float] = []
        weights = {name: source.weight for name, source in self.config.data.sources.items()}
        self.evaluate = Evaluator(corpus.held_out(), weights, self.config.data.batch_size, trainer.mesh, trainer.nll)

    def run(self, sinks: Sequence[Sink]) -> RunRecord:
        checkpoint = self.config.checkpoint
        self.checkpoints = Checkpoints(self.folder / "checkpoints", checkpoint.keep_last, checkpoint.keep_at)
        try:
            state, lines = self._resume()
            self.metrics = MetricsFile(self.folder, lines)
            self.sinks = [self.metrics, *optional_sinks(self.spec, self.folder), *sinks]
            try:
                reason = self.loop(state, len(lines)) if state is not None else None
            finally:
                for sink in self.sinks:
                    sink.close()
            return self._finish(reason)
        finally:
            self.checkpoints.close()

    # -------------------------------------------------------------------------------------------- resume

    def _resume(self) -> tuple[TrainState | None, list[dict[str, Any]]]:
        """The state to go on from (None: trained to the end already) and the metrics up to it."""
        lines = records.read_metrics(self.folder)
        self._count_attempt(lines)
        abstract = self.trainer.abstract
        restored = self.checkpoints.restore(abstract.params, abstract._replace(params={})._asdict(), say)
        if restored is not None:
            step, params, rest, _ = restored
            if [line["step"] for line in lines[:step]] != list(range(1, step + 1)):
                say(f"metrics.jsonl does not reach the checkpoint of step {step}; starting the run again")
                self.checkpoints.clear()  # those of `keep_at` too: the run comes by their steps again
            elif rest is not None:
                say(f"run {self.spec.id} resumes after step {step} of {self.steps}")
                return TrainState(params, rest["opt_state"], rest["step"]), lines[:step]
            elif step == self.steps and "held_out" in lines[step - 1]:
                return None, lines[:step]
        return self.trainer.initial_state(), []

    def _count_attempt(self, lines: list[dict[str, Any]]) -> None:
        """Seconds add up over attempts, also over what a killed one did after its last checkpoint."""
        path = self.folder / "attempts.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"attempts": 0, "seconds": 0.0}
        self.attempts = before["attempts"] + 1
        self.seconds_before = max(before["seconds"], lines[-1]["seconds"] if lines else 0.0)
        document = {"attempts": self.attempts, "seconds": self.seconds_before}
        write_atomically(path, json.dumps(document) + "\n")

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    # -------------------------------------------------------------------------------------------- loop

    def loop(self, state: TrainState, done: int) -> str | None:
        """Trains from update `done` to the end. Returns why the run diverged, or None."""
        config, steps, trainer = self.config, self.steps, self.trainer
        full_at_end = config.checkpoint.final == "all" or steps in config.checkpoint.keep_at
        every = max(1, round(config.train.eval_every * steps)) if config.train.eval_every else steps
        stream = self.corpus.stream(config.data_seed, done)
        saved_at = time.perf_counter()
        running: tuple[int, Any] | None = None  # the step whose metrics have not been read yet
        rate = optim.schedule(config.optim, steps)
        reason, self.last_read = None, None
        with stop_signal() as stop, contextlib.closing(stream):
            for step in range(done + 1, steps + 1):
                rows = sharding.put_rows(next(stream), trainer.mesh)
                state, metrics = trainer.step(state, rows, np.float32(rate(step - 1)))
                if running is not None and (reason := self._read(*running)):
                    break
                running = (step, metrics)

                # ---- what happens between steps
                now = time.perf_counter()
                save = (
                    step in config.checkpoint.keep_at
                    or (config.checkpoint.every and step % config.checkpoint.every == 0)
                    or (config.checkpoint.every_s and now - saved_at > config.checkpoint.every_s)
                    or stop.is_set()
                    or (step == steps and full_at_end)
                )
                evaluation = step % every == 0 or step == steps
                if not (save or evaluation):
                    continue
                if reason := self._read(*running, self.evaluate(state.params) if evaluation else None):
                    break
                running, self.last_read = None, None
                if save and (step < steps or full_at_end):
                    self._save(step, state, final=False)
                    saved_at = time.perf_counter()
                if stop.is_set() and step < steps:
                    self.checkpoints.wait()
                    raise Stopped(step, steps)
        if reason is None and config.checkpoint.final == "weights" and not full_at_end:
            self._save(steps, state, final=True)
        return reason

    def _read(self, step: int, metrics: Any, held_out: dict[str, Any] | None = None) -> str | None:
        """Waits for a step's metrics and writes its line. Returns the reason if the run has diverged there."""
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        now = time.perf_counter()
        if self.last_read is not None:
            self.step_times.append(now - self.last_read)
        self.last_read = now
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "seconds": round(self._seconds(), 3)}
        if "routing" in metrics:
            line["routing"] = {name: float(value) for name, value in metrics["routing"].items()}
        if held_out is not None:
            line["held_out"] = held_out
            if "load" in metrics:
                line["load"] = np.round(np.asarray(metrics["load"], np.float64), 5).tolist()
        for sink in self.sinks:
            sink.write(line)
        limit = self.config.train.diverge_above * math.log(self.trainer.model.vocab_size)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss}, gradient norm {grad_norm} at step {step}"
        if step > self.config.optim.warmup * self.steps and loss > limit:
            return f"loss {loss:.4g} above {limit:.4g} (train.diverge_above x ln V) at step {step}"
        if held_out is not None and not math.isfinite(held_out["loss"]):
            return f"held-out loss {held_out['loss']} at step {step}"
        return None

    def _save(self, step: int, state: TrainState, final: bool) -> None:
        os.fsync(self.metrics.file.fileno())  # a checkpoint vouches for the metrics up to it
        rest = None if final else state._replace(params={})._asdict()
        self.checkpoints.save(step, state.params, rest, {"run": self.spec.id})

    # -------------------------------------------------------------------------------------------- finish

    def _finish(self, reason: str | None) -> RunRecord:
        """Final weights first, then the superfluous checkpoints go, the record comes last."""
        keeps = reason is None and self.config.checkpoint.final != "nothing"
        self.checkpoints.keep_only(self.steps if keeps else None)
        record = self._record(reason)
        write_atomically(self.folder / "record.json", record.to_json())
        return record

    def _record(self, reason: str | None) -> RunRecord:
        config, model, corpus = self.config, self.trainer.model, self.corpus
        lines = records.read_metrics(self.folder)
        steps = lines[-1]["step"]
        batch_tokens = config.data.batch_size * config.data.seq_len
        tokens = steps * batch_tokens
        counts = flops.counts(model)
        compute = flops.conventions(model, config.data.seq_len, tokens)
        compute["flops"] = start.flops_per_token(config, model) * tokens
        held_out = {} if reason else lines[-1]["held_out"]
        tail = lines[-max(1, len(lines) // 10) :]
        routing = None
        if "routing" in tail[-1]:
            routing = {name: mean([line["routing"][name] for line in tail]) for name in tail[-1]["routing"]}
            if "balance" in routing:
                routing["load"] = tail[-1].get("load")
            if "selected" in held_out:
                routing["held_out_selected"] = held_out["selected"]
        step_seconds = statistics.median(self.step_times) if self.step_times else None
        rate = compute["flops"] / steps / step_seconds if step_seconds else None
        peak = peak_flops()
        devices = self.trainer.mesh.devices.flatten()
        commit, dirty = git_state()
        return RunRecord(
            id=self.spec.id, family=config.family, status="diverged" if reason else "done", reason=reason,
            seed=config.seed, data_seed=config.data_seed,
            params=counts.total, params_active=counts.active, params_non_embedding=counts.non_embedding,
            width=model.width, layers=model.layers, vocab_size=model.vocab_size,
            steps=steps, tokens=tokens, unique_tokens=corpus.unique_tokens,
            epochs=tokens / corpus.unique_tokens if corpus.unique_tokens else None,
            flops=compute["flops"], flops_6n=compute["flops_6n"],
            flops_6n_non_embedding=compute["flops_6n_non_embedding"],
            batch_tokens=batch_tokens, seq_len=config.data.seq_len,
            data=corpus.description, tokenizer=config.data.tokenizer,
            lr=config.optim.lr, schedule=config.optim.schedule, warmup=config.optim.warmup,
            weight_decay=config.optim.weight_decay, optimizer=config.optim.name, parametrization=model.parametrization,
            precision=model.compute_dtype,
            loss=held_out.get("loss"), loss_se=held_out.get("loss_se"),
            bpb=held_out.get("bpb"), bpb_se=held_out.get("bpb_se"), held_out=held_out.get("sources", {}),
            train_loss=mean([line["loss"] for line in tail]), entropy=corpus.entropy, routing=routing,
            start=self.spec.content.get(start.CONTENT), start_train=config.start.train if config.start.path else None,
            seconds=round(self._seconds(), 3), step_seconds=step_seconds,
            tokens_per_second=batch_tokens / step_seconds if step_seconds else None,
            flops_per_second=rate, mfu=rate / (peak * len(devices)) if rate and peak else None,
            peak_memory=peak_memory(), device=f"{len(devices)} x {devices[0].device_kind}", host=platform.node(),
            attempts=self.attempts, started=self.started, finished=utc(), versions=versions(),
            git_commit=commit, git_dirty=dirty,
        )  # fmt: skip


def mean(values: Sequence[float | None]) -> float | None:
    """None, which stands for a number that is not finite, makes the mean None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def write_failure(folder: pathlib.Path, error: BaseException) -> None:
    """Leaves `failure.json` for `scalelab status`; a full disk, which may be the failure itself, is no second one."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    document = {"reason": reason[:500], "traceback": "".join(traceback.format_exception(error)), "time": utc()}
    with contextlib.suppress(OSError):
        write_atomically(folder / "failure.json", json.dumps(document, indent=1) + "\n")
