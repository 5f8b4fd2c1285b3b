"""The `probe` source: synthetic tasks that ask what an architecture can do. Only answers are scored.

A source's path is the task and its options: `parity`, `modular,m=5`, `recall,pairs=16,least=1`, `copy,delay=8`. A row
is bos and T tokens; at some positions a label is asked for (`stream.labelled`), at the others nothing is.

**Tracking a state** (`parity`, `modular`): n = T - 1 random symbols x_i < `symbols`; after each the label is their sum
so far modulo m, which is never read: nothing but the symbols tells it. Parity is m = 2 with two symbols; two symbols
and another m count ones; m symbols and m add modulo m. What is measured at a length n is the last answer, which needs
all n symbols.

**Multi-query associative recall** (`recall`, also `mqar`; Arora et al. 2023, arXiv 2312.04927): `pairs` different keys,
each followed by its value; then every key comes once more and asks for its value, at a gap g after the pairs that is
drawn without replacement with probability ~ g^(power - 1): a power law, uniform where power = 1. Blanks are between
*(choice: the paper's code has random tokens there, and ties the order of the pairs to that of the draws)*.

**Copying** (`copy`): n symbols, `delay` blanks, a separator, and then the symbols again, each the label of the position
before it, as text would be (Jelassi et al. 2024, arXiv 2402.01032). `selective`: the blanks are scattered among the
symbols and not to be copied (Gu and Dao 2023, arXiv 2312.00752, who read no symbols while answering).

`least` > 0: a row's number of pairs or symbols is uniform from `least` up to the most; 0: it is the most. The most
symbols to copy is what fits T: T = 2 n + delay + 1.

Rows are pure functions of (task, seed, index). As of text, a sixteenth of all rows is held out by a hash of what they
read, whatever the seed: a training row that falls there is drawn again, a held-out row until it does.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from scalelab import config
from scalelab.data import draws
from scalelab.data.stream import MOST_TOKENS, HeldOut, labelled
from scalelab.errors import BadInput

_VERSION = "probe-1"  # changes whenever rows of the same task do
_ATTEMPTS = 1000  # (15/16)^1000 < 1e-28: a row that still isn't on its side has no such side

Rows = tuple[Int64[np.ndarray, "n T+1"], Int64[np.ndarray, "n T"]]  # tokens, labels (-1: none)


# ------------------------------------------------------------------------------------------------ tasks


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """`size` is what a task is made harder by: its length or its number of pairs. `alone`: of a row, the last answer
    is what is measured; else all are. Fields are the options of the spec."""

    axis: ClassVar[str] = "length"
    alone: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def vocab(self) -> int:
        """Symbols; bos comes after them."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing."""

    @abc.abstractmethod
    def wrong(self, T: int) -> str:
        """Why there are no rows of T tokens, or ""."""

    @abc.abstractmethod
    def up_to(self, size: int) -> tuple[Task, int]:
        """(task, sequence length) to train on, of this size at the most."""

    @abc.abstractmethod
    def at(self, size: int, T: int) -> tuple[Task, int]:
        """(task, sequence length) whose rows all have this size, for a task that is trained on rows of T."""

    @abc.abstractmethod
    def longest(self, T: int) -> int:
        """The largest size of rows of T tokens."""

    @abc.abstractmethod
    def width(self, T: int) -> int:
        """Random numbers that a row takes."""

    @abc.abstractmethod
    def draw(self, u: Float[np.ndarray, "n k"], T: int) -> Rows:
        """Rows, a function of such numbers alone."""

    def _blank(self, n: int, T: int, fill: int) -> Rows:
        tokens = np.full((n, T + 1), fill, np.int64)
        tokens[:, 0] = self.vocab
        return tokens, np.full((n, T), -1, np.int64)


@dataclasses.dataclass(frozen=True)
class Modular(Task):
    m: int = 3
    symbols: int = 2
    alone: ClassVar[bool] = True

    @property
    def vocab(self) -> int:
        return max(self.m, self.symbols)

    @property
    def chance(self) -> float:
        return 1 / self.m

    def wrong(self, T: int) -> str:
        if self.m < 2 or self.symbols < 2:
            return "m and symbols must be at least 2"
        return "" if T >= 2 else "needs a sequence length of at least 2: bos and a symbol"

    def up_to(self, size: int) -> tuple[Task, int]:
        return self, size + 1

    def longest(self, T: int) -> int:
        return T - 1

    def at(self, size: int, T: int) -> tuple[Task, int]:
        return self.up_to(size)

    def width(self, T: int) -> int:
        return T - 1

    def draw(self, u: Float[np.ndarray, "n k"], T: int) -> Rows:
        tokens, labels = self._blank(len(u), T, 0)
        tokens[:, 1:T] = (u * self.symbols).astype(np.int64)
        labels[:, 1:] = tokens[:, 1:T].cumsum(axis=1) % self.m
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class Parity(Modular):
    m: int = dataclasses.field(default=2, init=False)
    symbols: int = dataclasses.field(default=2, init=False)


@dataclasses.dataclass(frozen=True)
class Recall(Task):
    pairs: int = 8
    least: int = 0
    keys: int = 64
    values: int = 64
    power: float = 0.01
    axis: ClassVar[str] = "pairs"

    @property
    def vocab(self) -> int:
        return self.keys + self.values + 1

    @property
    def chance(self) -> float:
        return 1 / self.values

    def wrong(self, T: int) -> str:
        if self.pairs < 1 or not 0 <= self.least <= self.pairs:
            return "pairs must be at least 1, and least from 0 to pairs"
        if self.keys < self.pairs or self.values < 2:
            return f"keys must be at least pairs = {self.pairs}, and values at least 2"
        if not 0 <= self.power <= 1:
            return "power must lie in [0, 1]"
        need = 3 * self.pairs + 1
        return "" if need <= T else f"needs a sequence length of at least {need}: bos, pairs and queries"

    def up_to(self, size: int) -> tuple[Task, int]:
        """Twice the room that the queries need."""
        return dataclasses.replace(self, pairs=size), 4 * size + 1

    def at(self, size: int, T: int) -> tuple[Task, int]:
        """Rows as long as in training, or as the pairs need."""
        return dataclasses.replace(self, pairs=size, least=0), max(T, 3 * size + 1)

    def longest(self, T: int) -> int:
        return self.pairs

    def width(self, T: int) -> int:
        return 1 + self.keys + 2 * self.pairs + T

    def draw(self, u: Float[np.ndarray, "n k"], T: int) -> Rows:
        N, (tokens, labels) = self.pairs, self._blank(len(u), T, self.vocab - 1)
        u_n, u_keys, u_values, u_order, u_slots = np.split(u, np.cumsum([1, self.keys, N, N]), axis=1)
        n = _between(self.least, N, u_n)
        keys = np.argsort(u_keys, axis=1, kind="stable")[:, :N]
        values = self.keys + (u_values * self.values).astype(np.int64)
        there = np.arange(N) < n
        row, pair = np.nonzero(there)
        tokens[row, 1 + 2 * pair], tokens[row, 2 + 2 * pair] = keys[there], values[there]
        # Draws without replacement, in proportion to weights: the least of -log(u) / weight (exponential races).
        gap = np.arange(T) - 2 * n
        race = np.where(gap > 0, -np.log1p(-u_slots) * np.maximum(gap, 1.0) ** (1 - self.power), np.inf)
        slots = np.argsort(race, axis=1, kind="stable")[:, :N]
        order = np.argsort(np.where(there, u_order, np.inf), axis=1, kind="stable")  # which pair each slot asks for
        at, asked = slots[there], order[there]
        tokens[row, at], labels[row, at] = keys[row, asked], values[row, asked]
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class Copy(Task):
    symbols: int = 16
    delay: int = 0
    least: int = 0
    selective: bool = False

    @property
    def vocab(self) -> int:
        return self.symbols + 2  # blank, separator

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def wrong(self, T: int) -> str:
        if self.symbols < 2 or self.delay < 0:
            return "symbols must be at least 2, and delay at least 0"
        most, need = self.longest(T), 2 * max(1, self.least) + self.delay + 1
        if most < max(1, self.least):
            return f"needs a sequence length of at least {need}: bos, symbols, delay, separator, symbols"
        return "" if self.least >= 0 else "least must be at least 0"

    def up_to(self, size: int) -> tuple[Task, int]:
        return self, 2 * size + self.delay + 1

    def at(self, size: int, T: int) -> tuple[Task, int]:
        return dataclasses.replace(self, least=0).up_to(size)

    def longest(self, T: int) -> int:
        return (T - 1 - self.delay) // 2

    def width(self, T: int) -> int:
        most = self.longest(T)
        return 1 + most + most + self.delay

    def draw(self, u: Float[np.ndarray, "n k"], T: int) -> Rows:
        most, (tokens, labels) = self.longest(T), self._blank(len(u), T, self.symbols)
        u_n, u_symbols, u_places = np.split(u, [1, 1 + most], axis=1)
        n = _between(self.least, most, u_n)
        symbols = (u_symbols * self.symbols).astype(np.int64)
        there = np.arange(most) < n
        row, i = np.nonzero(there)
        if self.selective:  # n of the n + delay places, in order
            race = np.where(np.arange(most + self.delay) < n + self.delay, u_places, np.inf)
            chosen = np.argsort(race, axis=1, kind="stable")[:, :most]
            places = np.sort(np.where(there, chosen, T), axis=1)
        else:
            places = np.broadcast_to(np.arange(most), there.shape)
        tokens[row, 1 + places[there]] = symbols[there]
        separator = 1 + n + self.delay
        tokens[np.arange(len(u)), separator[:, 0]] = self.symbols + 1
        at = np.broadcast_to(separator, there.shape)[there] + i
        labels[row, at], tokens[row, at + 1] = symbols[there], symbols[there]
        return tokens, labels


TASKS: dict[str, type[Task]] = {"parity": Parity, "modular": Modular, "recall": Recall, "mqar": Recall, "copy": Copy}


def _between(least: int, most: int, u: Float[np.ndarray, "n 1"]) -> Int64[np.ndarray, "n 1"]:
    """Uniform from `least` to `most`; `most` where least is 0."""
    low = least or most
    return low + (u * (most - low + 1)).astype(np.int64)


# ------------------------------------------------------------------------------------------------ the source


def parse(spec: str, field: str) -> Task:
    """`"recall,pairs=16,least=1"` -> the task. Raises `BadInput`."""
    name, _, options = spec.partition(",")
    if name not in TASKS:
        raise BadInput(field, spec, f"must begin with one of {', '.join(TASKS)}")
    kind = TASKS[name]
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    try:
        return kind(**config.parse_arg(options, **defaults).to_dict())
    except BadInput as error:
        raise BadInput(field, spec, f"{error.field}: {error.remedy}") from None


def spec(task: Task) -> str:
    """What `parse` reads, every option spelled out."""
    name = next(name for name, kind in TASKS.items() if kind is type(task))
    options = (f"{f.name}={getattr(task, f.name)}" for f in dataclasses.fields(task) if f.init)
    return ",".join((name, *options))


def content(spec_: str, field: str) -> str:
    """Hash of all that determines the rows."""
    return hashlib.sha256(f"{_VERSION} {spec(parse(spec_, field))}".encode()).hexdigest()


class Numbers:
    """Tokenizer of a task: a token is written as its number; `bos` is the last."""

    lossless = True

    def __init__(self, symbols: int):
        self.bos, self.vocab_size, self.fingerprint = symbols, symbols + 1, f"numbers-{symbols}"

    def encode(self, text: str) -> list[int]:
        ids = [int(word) for word in text.split()]
        if not all(0 <= i < self.bos for i in ids):
            raise ValueError
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"{i} " for i in ids if i != self.bos)

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.array(self.encode(document.decode()), np.uint16) for document in documents]


class Probe:
    """The source: endless rows by number, for a sequence length (see `corpus.Source`). Labels follow from what was
    read: the entropy of an answer is 0."""

    examples = None
    entropy = 0.0

    def __init__(self, spec: str, seq_len: int, field: str):
        self.task, self.seq_len, self._field = parse(spec, field), seq_len, field
        self._spec = spec
        self.content = content(spec, field)
        if self.task.vocab >= MOST_TOKENS:
            raise BadInput(field, spec, f"has {self.task.vocab} symbols; at most {MOST_TOKENS - 1}")
        if wrong := self.task.wrong(seq_len):
            raise BadInput(field, spec, f"{wrong} (config.data.seq_len = {seq_len})")
        self.tokenizer = Numbers(self.task.vocab)

    def rows(self, seed: int, indices: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, "n T+1"]:
        return labelled(*self._draw(draws.key(self.content, "train", seed), indices, held_out=False))

    def held_out(self, limit: int) -> HeldOut:
        """As many different rows as fit the limit, or fewer where there are not so many. A row is a document, of as
        many bytes as answers."""
        numbers = np.arange(max(1, limit // self.seq_len))
        tokens, labels = self._draw(draws.key(self.content, "held out"), numbers, held_out=True)
        first = np.sort(np.unique(tokens, axis=0, return_index=True)[1])
        tokens, labels = tokens[first], labels[first]
        asked = labels >= 0
        doc = np.where(asked, np.arange(len(tokens))[:, None], -1).astype(np.int32)
        return HeldOut(labelled(tokens, labels), doc, asked.sum(axis=1).astype(np.int64))

    def _draw(self, key: draws.Key, indices: Int64[np.ndarray, " n"], held_out: bool) -> Rows:
        T, width = self.seq_len, self.task.width(self.seq_len)
        tokens, labels = self.task._blank(len(indices), T, 0)
        left = np.arange(len(indices))
        for attempt in range(_ATTEMPTS):
            drawn, asked = self.task.draw(draws.rows(key, indices[left], width, attempt), T)
            ready = is_held_out(drawn[:, :T]) == held_out
            tokens[left[ready]], labels[left[ready]] = drawn[ready], asked[ready]
            left = left[~ready]
            if not len(left):
                return tokens, labels
        side = "hold some out" if held_out else "train on some that are not held out"
        raise BadInput(self._field, self._spec, f"too few different rows of {T} tokens to {side}; lengthen them")

    def describe(self) -> dict[str, Any]:
        return {"spec": spec(self.task), "entropy": 0.0, "unique_tokens": None}


def is_held_out(tokens: Int64[np.ndarray, "n T"]) -> Bool[np.ndarray, " n"]:
    """One row in sixteen, by a hash of it that knows neither task nor seed (a sum with random weights, then mixed)."""
    weights = np.random.Philox(key=np.array(draws.key(_VERSION, "held out"), np.uint64)).random_raw(tokens.shape[1])
    x = ((tokens.astype(np.uint64) + np.uint64(1)) * weights).sum(axis=1, dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(60) == 0
