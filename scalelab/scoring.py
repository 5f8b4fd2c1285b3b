"""`scalelab eval`: a finished run on held-out sets, at other context lengths, and on multiple choice.

**Context.** A set's held-out documents, end to end, are cut into windows of the context's length that overlap by one
token, so that every token is scored once, and each window is one pass over all of it, from an empty state: at position
i of a window the model has read i + 1 tokens of it, and, where the run keeps documents apart, only those of the same
document. Nothing is carried from one window into the next. So sets are the same at every context, and longer windows
differ by what a token can see; positions beyond the training's are read as they come (rotary angles go on, states are
carried on; learned positions end, and longer windows are refused). `curve` has the loss by how much could be seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scalelab import choices, data, host, records, restore, update
from scalelab.config import override
from scalelab.data import HeldOut
from scalelab.errors import BadInput
from scalelab.evaluate import ratio
from scalelab.recipe import source

AT_ONCE = 16384  # tokens in a pass


@dataclasses.dataclass(frozen=True)
class Plan:
    """sets: name -> reference of `recipe.source`, none for the run's own. contexts: none for the run's own length.
    tasks: name -> (path, questions, hash)."""

    sets: dict[str, str]
    contexts: Sequence[int]
    tasks: dict[str, tuple[str, list[choices.Question], str]]


def finished(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The folders of the runs that have weights to score. Raises `BadInput` if there is none."""
    folders, why = [], "has no finished run"
    for folder in records.run_folders(path):
        record = records.read(folder)
        if record is not None and record.status == "done":
            folders.append(folder)
        elif record is not None:
            why = f"has no weights: it diverged ({record.reason})"
    if not folders:
        raise BadInput("run", str(path), why)
    return folders


def plan(sets: Sequence[str], contexts: Sequence[int], tasks: Sequence[str]) -> Plan:
    """What to score, with the files of tasks read. A name is given as NAME=..., or is the file's without its ending."""
    named: dict[str, dict[str, str]] = {"--data": {}, "--tasks": {}}
    for option, references in (("--data", sets), ("--tasks", tasks)):
        for reference in references:
            name, what = _named(reference)
            if name in named[option]:
                raise BadInput(option, reference, f"is the second of the name {name}; NAME=... gives it another")
            named[option][name] = what
    read = {name: (path, *choices.read(path)) for name, path in named["--tasks"].items()}
    if clash := set(named["--data"]) & set(read):
        raise BadInput("--tasks", min(clash), "is also a set's name; NAME=... gives it another")
    return Plan(named["--data"], contexts, read)


def _named(reference: str) -> tuple[str, str]:
    match = re.fullmatch(r"([\w.-]+)=(.+)", reference)
    if match and not pathlib.Path(reference).exists():
        return match[1], match[2]
    kind, _, spec = reference.partition(":")
    if kind in ("synthetic", "probe"):
        return (f"{kind}:{spec}" if spec else kind), reference
    path = pathlib.Path(reference)
    return (path.stem if path.is_file() else path.resolve().name), reference


def score(folder: pathlib.Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """Scores one run, and puts what was found into its record: `NAME@CONTEXT` for a set, NAME for a task."""
    host.use_compilation_cache()
    run = Scorer(restore.load(folder))
    found: dict[str, dict[str, Any]] = {}
    trained = run.config.data.seq_len
    asked = {name: choices.ask(task[1], run.tokenizer, task[0], run.positions) for name, task in plan.tasks.items()}
    for context in plan.contexts or ([] if plan.tasks and not plan.sets else [trained]):
        if 0 < run.positions < context:
            raise BadInput("--context", context, f"is beyond the {run.positions} learned positions of {folder.name}")
        for name, held, content in run.held_out(plan.sets, context):
            found[f"{name}@{context}"] = {"context": context, "content": content, **run.loss(held)}
    for name, (questions, cut) in asked.items():
        results = choices.results(questions, run.nats(questions))
        found[name] = {"content": plan.tasks[name][2], "cut": cut, **results}
    records.add_evaluations(folder, found)
    return found


class Scorer:
    """A run with its parameters, and the compiled pass that scores rows."""

    def __init__(self, run: restore.Opened):
        self.config, self.tokenizer, self.params = run.spec.config, run.tokenizer, run.params
        self.run, self.positions = run, run.model.positions
        nll = update.make_nll(self.config, run.model, self.tokenizer.bos)
        self.nll = jax.jit(lambda params, rows: nll(params, rows)[0])

    def held_out(self, sets: dict[str, str], context: int) -> list[tuple[str, HeldOut, str]]:
        """(name, windows, content hash) of each set; of the run's own sources where none is named."""
        opened = []
        if not sets:
            section = self.config.data
            corpora = {name: {"data.sources": {name: fields.to_dict()}} for name, fields in section.sources.items()}
        else:
            corpora = {name: {"data.sources": {"set": source(reference)}} for name, reference in sets.items()}
        for name, changes in corpora.items():
            changed = override(self.config, {**changes, "data.seq_len": context})
            with _of_option(name, sets):
                corpus = data.open(changed.data)
                restore.check_tokenizer(self.run, corpus.tokenizer, "--data", sets.get(name, name))
                (held,) = corpus.held_out().values()
                opened.append((name, held, next(iter(corpus.content.values()))))
        return opened

    def loss(self, held: HeldOut) -> dict[str, Any]:
        """loss and bpb with standard errors, and `curve`: [tokens seen from, to, loss, its error, targets scored]."""
        n, T = held.doc.shape
        B = max(1, min(n, AT_ONCE // T))
        running = []  # all passes are under way before the first is waited for
        for start in range(0, n, B):
            rows = held.tokens[start : start + B]
            rows = np.concatenate([rows, np.repeat(rows[-1:], B - len(rows), axis=0)])  # one shape, one compilation
            running.append(self.nll(self.params, rows))
        nats = np.concatenate([np.asarray(part, np.float64) for part in running])[:n]
        kept = held.doc >= 0
        documents = len(held.bytes)
        of = functools.partial(_by_document, held.doc, documents)
        loss, loss_se = ratio(of(kept, nats), of(kept))
        bpb, bpb_se = ratio(of(kept, nats) / math.log(2), held.bytes.astype(np.float64))
        seen = self._seen(data.split_rows(held.tokens)[0])
        curve, low, high = [], 1, 1
        while low <= T:  # 1, 2, 3-4, 5-8, ..
            mask = kept & (seen >= low) & (seen <= high)
            if mask.any():
                tokens = of(mask)
                some = tokens > 0
                mean, error = ratio(of(mask, nats)[some], tokens[some])
                curve.append([low, min(high, T), mean, error, int(mask.sum())])
            low, high = high + 1, 2 * high
        return {"loss": loss, "loss_se": loss_se, "bpb": bpb, "bpb_se": bpb_se, "documents": documents,
                "tokens": int(kept.sum()), "curve": curve}  # fmt: skip

    def _seen(self, tokens: np.ndarray) -> np.ndarray:
        """How many tokens each prediction has read, itself the last: of its window, and of its document."""
        position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if not self.config.data.document_mask:
            return position + 1
        start = np.maximum.accumulate(np.where(tokens == self.tokenizer.bos, position, 0), axis=1)
        return position - start + 1

    def nats(self, questions: Sequence[choices.Asked]) -> np.ndarray:
        """Negative log-likelihood of every choice, in order."""
        nats = np.zeros(sum(len(question.tokens) for question in questions))
        for numbers, rows in choices.rows(questions, AT_ONCE):
            nats[numbers] = np.asarray(self.nll(self.params, rows), np.float64).sum(axis=1)[: len(numbers)]
        return nats


def _by_document(doc: np.ndarray, documents: int, mask: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
    """Sum over the masked targets of each document; their number, without values."""
    return np.bincount(doc[mask], None if values is None else values[mask], documents).astype(np.float64)


@contextlib.contextmanager
def _of_option(name: str, sets: dict[str, str]) -> Iterator[None]:
    """An error in opening a set names the option that it came by."""
    try:
        yield
    except BadInput as error:
        if error.field == "config.data.seq_len":
            raise BadInput("--context", error.value, error.remedy) from None
        if error.field == "--data" or name not in sets:
            raise
        raise BadInput("--data", sets[name], f"{error.field.removeprefix('config.')}: {error.remedy}") from None
