"""A corpus: sources by name, mixed by weight, as batches that are a pure function of (seed, step).

Row g of the training data (g = step * B + row in the batch) belongs to one source, by its weight; the k-th row of a
source is window `shuffle(k mod n)` of its n windows, with another shuffle in each epoch k // n (Grain's index shuffle,
a keyed permutation computed point by point). Nothing depends on what was read before, nor on hosts or threads: the
step is the position.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Int64

from scalelab.data import probes, shards, synthetic, text, tokenizers
from scalelab.data.stream import HeldOut, TokenSource, Windows, held_out_windows
from scalelab.errors import BadInput
from scalelab.schema import SOURCE_KINDS, choice

if TYPE_CHECKING:
    import grain

# ------------------------------------------------------------------------------------------------ sources


class Source(Protocol):
    """One source, cut for a sequence length: rows of T + 1 tokens by number."""

    @property
    def tokenizer(self) -> tokenizers.Tokenizer: ...

    @property
    def content(self) -> str: ...

    @property
    def examples(self) -> int | None: ...  # rows in an epoch; None: endless

    @property
    def entropy(self) -> float | None: ...  # nats per token, where known

    def rows(self, seed: int, indices: Int64[np.ndarray, " n"]) -> np.ndarray: ...

    def held_out(self, limit: int) -> HeldOut: ...

    def describe(self) -> dict[str, Any]: ...


class _Text:
    """A source of documents (text or shards): windows of its stream, shuffled in each epoch."""

    entropy = None

    def __init__(self, source: TokenSource, name: str, seq_len: int):
        self._source, self._seq_len = source, seq_len
        self._windows = Windows(source.parts, seq_len)
        self.examples = self._windows.count
        if self.examples == 0:
            remedy = f"is longer than the training text of {name} ({self._windows.tokens} tokens, one more is needed)"
            raise BadInput("config.data.seq_len", seq_len, f"{remedy}; shorten it or name a longer text")
        self.tokenizer, self.content = source.tokenizer, source.content
        # Grain's shuffle takes seed + epoch: seeds are hashed, so that two near ones never share an epoch's order.
        self._name = name

    def rows(self, seed: int, indices: Int64[np.ndarray, " n"]) -> np.ndarray:
        from grain.experimental import index_shuffle

        key, last = _hash32(seed, self._name), self.examples - 1
        epochs, offsets = np.divmod(indices, self.examples)
        shuffled = [
            index_shuffle(offset, max_index=last, seed=(key + epoch) % 2**32, rounds=4)
            for epoch, offset in zip(epochs.tolist(), offsets.tolist(), strict=True)
        ]
        return self._windows.rows(np.array(shuffled, np.int64))

    def held_out(self, limit: int) -> HeldOut:
        lengths = np.cumsum([len(document) + 1 for document in self._source.held_out])
        count = max(1, int(np.searchsorted(lengths, limit, "right")))
        chosen, sizes = self._source.held_out[:count], self._source.held_out_bytes[:count]
        return held_out_windows(chosen, sizes, self.tokenizer.bos, self._seq_len)

    def describe(self) -> dict[str, Any]:
        source = self._source
        return {
            "bytes": source.bytes,
            "documents": source.documents,
            "files": source.files,
            "skipped_files": source.skipped,
            "held_out_documents": len(source.held_out),
            "held_out_lossy": source.lossy,
            "unique_tokens": self.examples * self._seq_len,
        }


def _hash32(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


# ------------------------------------------------------------------------------------------------ the mixture


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Which source row g is of, and how many rows of it came before: in O(sources), for any g, without a state.

    Source after source takes its share q / 2^24 of the rows that those before it left, spread evenly: of the first m
    rows left, floor(m * q / 2^24) are its own.
    """

    shares: tuple[int, ...]

    @classmethod
    def of(cls, weights: list[float]) -> Mixture:
        left = np.cumsum(weights[::-1])[::-1]
        shares = (round(w / rest * 2**24) for w, rest in zip(weights, left, strict=True))
        return cls(tuple(min(max(share, 1), 2**24 - 1) for share in shares))

    def locate(self, g: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(source, index within the source) of each row."""
        source, index = np.full(len(g), len(self.shares) - 1), np.array(g, np.int64)
        open_ = np.ones(len(g), bool)
        for number, share in enumerate(self.shares[:-1]):
            before, after = index * share >> 24, (index + 1) * share >> 24
            mine = open_ & (after > before)
            source[mine] = number
            index = np.where(mine, before, np.where(open_, index - before, index))
            open_ &= ~mine
        return source, index


# Batches that a thread reads before it is handed the next: handing over costs about as much as a small batch.
_AT_ONCE = 8


class _Steps:
    """Grain data source whose element `step` is this host's rows of the global batch."""

    def __init__(self, corpus: Corpus, seed: int, host: int, hosts: int):
        self._corpus, self._seed = corpus, seed
        self._rows = corpus.batch_size // hosts
        self._first = host * self._rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        corpus = self._corpus
        g = index * corpus.batch_size + self._first + np.arange(self._rows, dtype=np.int64)
        number, position = corpus.mixture.locate(g)
        batch = np.empty((self._rows, corpus.seq_len + 1), np.int32)
        for i, source in enumerate(corpus.sources.values()):
            if (mine := number == i).any():
                batch[mine] = source.rows(self._seed, position[mine])
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Open data. `open` makes one.

    vocab_size counts `bos`, the id that begins every document. unique_tokens: training targets in one epoch, over all
    sources; None if one is endless. content: source name -> SHA-256 of what it says and of the tokenizer. entropy: the
    expected loss, in nats per token, that no model can beat, where the data are one synthetic source; else None (a
    mixture has a lower floor than the mean of its parts' only by what a row tells of its source, which isn't known).
    """

    sources: Mapping[str, Source]
    mixture: Mixture
    seq_len: int
    batch_size: int
    held_out_tokens: int
    threads: int
    description: dict[str, Any]

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return next(iter(self.sources.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bos(self) -> int:
        return self.tokenizer.bos

    @property
    def content(self) -> dict[str, str]:
        return {name: source.content for name, source in self.sources.items()}

    @property
    def unique_tokens(self) -> int | None:
        counts = [source.examples for source in self.sources.values()]
        return None if None in counts else self.seq_len * sum(filter(None, counts))

    @property
    def entropy(self) -> float | None:
        return next(iter(self.sources.values())).entropy if len(self.sources) == 1 else None

    def batches(self, seed: int, host: int = 0, hosts: int = 1) -> grain.MapDataset:
        """MapDataset whose element `step` is int32 (B / hosts, T + 1): this host's rows of the global batch, in order.

        Host h has rows h * B / hosts to (h + 1) * B / hosts. Raises `BadInput` if the hosts don't divide the batch.
        """
        import grain

        if self.batch_size % hosts:
            raise BadInput("config.data.batch_size", self.batch_size, f"must be a multiple of the {hosts} hosts")
        return grain.MapDataset.source(_Steps(self, seed, host, hosts))

    def stream(self, seed: int, start: int, host: int = 0, hosts: int = 1) -> Generator[np.ndarray, None, None]:
        """Batches from step `start` on, in order, read ahead by `threads` threads, which end when it is closed.

        It is a generator: `close()` it, or wrap it in `contextlib.closing`.
        """
        batches: Any = self.batches(seed, host, hosts)

        def read(step: int) -> list[np.ndarray]:
            return [batches[step + i] for i in range(_AT_ONCE)]

        pool = concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix="data")
        try:
            steps = itertools.count(start, _AT_ONCE)
            queue = collections.deque(pool.submit(read, step) for step in itertools.islice(steps, 1 + self.threads))
            while True:
                ready = queue.popleft().result()
                queue.append(pool.submit(read, next(steps)))
                yield from ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def held_out(self) -> dict[str, HeldOut]:
        """Per source, whole held-out documents in hash order, as many as fit `held_out_tokens` (at least one).

        The same documents for every run on the data, whatever its seed, batch or sequence length.
        """
        return {name: source.held_out(self.held_out_tokens) for name, source in self.sources.items()}


# ------------------------------------------------------------------------------------------------ opening


def open(config_data: Any) -> Corpus:
    """Opens `config.data`. Raises `BadInput`, naming the field, for whatever can't be read or is too small."""
    _check(config_data)
    seq_len = config_data.seq_len
    tokenizer = _text_tokenizer(config_data)
    texts: dict[str, text.Documents] = {}
    for name, source in config_data.sources.items():
        if source.kind == "text":
            texts[name] = text.read(source.path, _path_field(name))
    held = {digest for documents in texts.values() for digest in text.held_out_digests(documents.digests)}
    sources: dict[str, Source] = {}
    for name, source in config_data.sources.items():
        if source.kind == "text":
            assert tokenizer is not None
            sources[name] = _Text(text.tokenize(texts[name], held, tokenizer, _path_field(name)), name, seq_len)
        elif source.kind == "tokens":
            sources[name] = _Text(shards.read(source.path, _path_field(name)), name, seq_len)
        elif source.kind == "synthetic":
            sources[name] = synthetic.Synthetic(source.path, seq_len, _path_field(name))
        else:
            sources[name] = probes.Probe(source.path, seq_len, _path_field(name))
    _check_same_tokenizer(sources)
    weights = [source.weight for source in config_data.sources.values()]
    description = {
        "tokenizer": next(iter(sources.values())).tokenizer.fingerprint,
        "vocab_size": next(iter(sources.values())).tokenizer.vocab_size,
        "sources": {
            name: {
                "kind": config_data.sources[name].kind,
                "weight": weight / sum(weights),
                "content": source.content,
                **source.describe(),
            }
            for (name, source), weight in zip(sources.items(), weights, strict=True)
        },
    }
    return Corpus(
        sources=sources,
        mixture=Mixture.of(weights),
        seq_len=seq_len,
        batch_size=config_data.batch_size,
        held_out_tokens=config_data.held_out_tokens,
        threads=config_data.threads,
        description=description,
    )


def open_tokenizer(config_data: Any) -> tokenizers.Tokenizer:
    """The tokenizer of `config.data`, without reading any text."""
    _check(config_data)
    name, source = next(iter(config_data.sources.items()))
    if source.kind == "text":
        return tokenizers.load(config_data.tokenizer)
    if source.kind == "tokens":
        return shards.open_tokenizer(source.path, _path_field(name))
    if source.kind == "synthetic":
        return synthetic.Symbols(synthetic.parse(source.path, _path_field(name))["vocab"])
    return probes.Numbers(probes.parse(source.path, _path_field(name)).vocab)


def fingerprint(config_data: Any) -> dict[str, str]:
    """`Corpus.content` without opening the corpus: nothing is tokenized, JAX and Grain are not imported."""
    _check(config_data)
    tokenizer = _text_tokenizer(config_data)
    content: dict[str, str] = {}
    for name, source in config_data.sources.items():
        if source.kind == "text":
            assert tokenizer is not None
            content[name] = text.content(text.read(source.path, _path_field(name)), tokenizer)
        elif source.kind == "tokens":
            content[name] = shards.manifest(source.path, _path_field(name))["content"]
        elif source.kind == "synthetic":
            content[name] = synthetic.content(source.path, _path_field(name))
        else:
            content[name] = probes.content(source.path, _path_field(name))
    return content


def _path_field(name: str) -> str:
    return f"config.data.sources.{name}.path"


def _text_tokenizer(config_data: Any) -> tokenizers.Tokenizer | None:
    """The config's tokenizer, which only text uses."""
    kinds = {source.kind for source in config_data.sources.values()}
    return tokenizers.load(config_data.tokenizer) if "text" in kinds else None


def _check(config_data: Any) -> None:
    if not config_data.sources:
        raise BadInput("config.data.sources", {}, "needs at least one source")
    for field in ("seq_len", "batch_size", "held_out_tokens", "threads"):
        if config_data[field] < 1:
            raise BadInput(f"config.data.{field}", config_data[field], "must be at least 1")
    for name, source in config_data.sources.items():
        choice(f"data.sources.{name}.kind", source.kind, SOURCE_KINDS)
        if not 0 < source.weight < float("inf"):
            raise BadInput(f"config.data.sources.{name}.weight", source.weight, "must be above 0 and finite")


def _check_same_tokenizer(sources: Mapping[str, Source]) -> None:
    (first, one), *others = sources.items()
    for name, source in others:
        if source.tokenizer.fingerprint != one.tokenizer.fingerprint:
            remedy = f"has another tokenizer than {first}; sources of one run must share theirs"
            raise BadInput(f"config.data.sources.{name}", source.tokenizer.fingerprint, remedy)
