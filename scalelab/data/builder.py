"""`scalelab data build`: documents -> shuffled token shards (see `shards`), resumable at any moment.

Three stages, each leaving finished files behind, renamed into place when whole, under OUT/.build:
1. a tokenizer, if one is to be trained (BPE over bytes, on training documents only);
2. parts: some megabytes of documents of an input, tokenized, with each document's hash and lengths;
3. shards: the documents of all parts, split by hash, shuffled, written out.
The manifest comes last. What is there is not made again, and nothing that is written depends on where an earlier
attempt was stopped, on the size of the parts or on the clock: the bytes are those of an uninterrupted build.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from scalelab.data import inputs, shards, text, tokenizers
from scalelab.errors import BadInput

PART_BYTES = 2**25
SAMPLE_BYTES = 2**26  # of text that a BPE is trained on

# One per document. `digest`: the first 16 bytes of the SHA-256 of its text.
_DOCUMENT = np.dtype([("digest", "<u8", 2), ("tokens", "<i8"), ("bytes", "<i8")])

Advance = Callable[[str, float], None]  # what is being done, and the share of it that is


def build(
    names: Sequence[str],
    out: str | os.PathLike[str],
    tokenizer: str = "bytes",
    text_field: str = "text",
    shard_tokens: int = 2**26,
    seed: int = 0,
    held_out: float = text.HELD_OUT_SHARE,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> dict[str, Any]:
    """Tokenizes documents into the folder `out` and returns its manifest. See `inputs` for what can be read.

    tokenizer: `bytes`; `bpe:VOCAB`, trained here, VOCAB ids in all, bos included; or the path of a tokenizer.json.
    shard_tokens: the most tokens of a shard (one longer document makes a longer shard). held_out: share of the
    documents, by hash; data that is to be mixed needs the same share, lest a document that one source holds out be
    trained on in another. part_bytes: text between two points that a build can be continued from. Given again after
    any interruption, the same call continues; after the end, it does nothing. Raises `BadInput`, leaving nothing behind
    if it is an input that can't be read, and `FeatureMissing` where one needs a package that is not installed.
    """
    _check(tokenizer, shard_tokens, held_out, seed)
    found = inputs.find([str(name) for name in names])
    options = {
        "schema": shards.SCHEMA,
        "tokenizer": _tokenizer_option(tokenizer),
        "text_field": text_field,
        "shard_tokens": shard_tokens,
        "seed": seed,
        "held_out": held_out,
    }
    out = pathlib.Path(out)
    work = out / ".build"
    plan = {"options": options, "inputs": [[item.name, item.state, item.piece] for item in found]}
    done = _begin(out, work, plan)
    try:
        if not done:
            with _bar(progress) as advance:
                encoder = _tokenizer(work, out, tokenizer, found, text_field, held_out, advance)
                counts = _parts(work, found, encoder, text_field, part_bytes, advance)
                _shards(out, work, encoder, found, counts, options, advance)
    except BadInput as error:
        if error.field != "data build --out":  # an input or an option has to change, so this can't be continued
            _discard(out, work)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return shards.manifest(str(out), "data build --out")


# ------------------------------------------------------------------------------------------------ begin


def _check(tokenizer: str, shard_tokens: int, held_out: float, seed: int) -> None:
    if tokenizer.startswith("bpe:"):
        size = tokenizer.removeprefix("bpe:")
        if not size.isdigit() or not 257 <= int(size) <= 2**24:
            raise BadInput(
                "data build --tokenizer", tokenizer, "bpe:VOCAB needs 257 to 2^24 ids (256 bytes, bos, merges)"
            )
    elif tokenizer != "bytes" and not pathlib.Path(tokenizer).is_file():
        remedy = "must be bytes, bpe:VOCAB or the path of a tokenizer.json"
        raise BadInput("data build --tokenizer", tokenizer, remedy)
    if shard_tokens < 1:
        raise BadInput("data build --shard-tokens", shard_tokens, "must be at least 1")
    if not 0 < held_out < 1:
        raise BadInput("data build --held-out", held_out, "must lie between 0 and 1, both out")
    if not 0 <= seed < 2**64:
        raise BadInput("data build --seed", seed, "must lie in [0, 2^64)")


def _tokenizer_option(tokenizer: str) -> str:
    """What of the tokenizer decides the output: not where its file lies, but what it says."""
    if tokenizer == "bytes" or tokenizer.startswith("bpe:"):
        return tokenizer
    return tokenizers.load(tokenizer, "data build --tokenizer").fingerprint


def _begin(out: pathlib.Path, work: pathlib.Path, plan: dict[str, Any]) -> bool:
    """True if the build is done already. Raises `BadInput` if the folder holds anything but this build."""
    if (out / "manifest.json").exists():
        finished = shards.manifest(str(out), "data build --out")
        if finished["plan"] == _plan_hash(plan):
            return True
        raise BadInput("data build --out", str(out), "holds another finished build; name another folder or delete it")
    if (work / "plan.json").exists():
        begun = json.loads((work / "plan.json").read_text(encoding="utf-8"))
        if begun != plan:
            before = begun["options"] | {"INPUT": begun["inputs"]}
            now = plan["options"] | {"INPUT": plan["inputs"]}
            changed = ", ".join(name for name in now if before.get(name) != now[name])
            remedy = f"holds an unfinished build with other {changed}; continue that one, or delete the folder"
            raise BadInput("data build --out", str(out), remedy)
        return False
    if out.exists() and (not out.is_dir() or any(file.name != ".build" for file in out.iterdir())):
        raise BadInput("data build --out", str(out), "must be a new or empty folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("data build --out", str(out), f"can't be made: {error.strerror}") from None
    _write(work, work / "plan.json", json.dumps(plan).encode())
    return False


def _discard(out: pathlib.Path, work: pathlib.Path) -> None:
    """Removes what this build wrote, and the folder if nothing else is in it."""
    shutil.rmtree(work, ignore_errors=True)
    for pattern in ("tokenizer.json", "train-*.bin", "held_out-*.bin", "held_out.npy"):
        for file in out.glob(pattern):
            file.unlink()
    with contextlib.suppress(OSError):
        out.rmdir()


def _plan_hash(plan: dict[str, Any]) -> str:
    """Knows the inputs by name and size, not by folder or time: a moved or copied build is still the same one."""
    names = [[pathlib.Path(name).name, state.split()[0], piece] for name, state, piece in plan["inputs"]]
    return hashlib.sha256(json.dumps([plan["options"], names]).encode()).hexdigest()


def _write(work: pathlib.Path, file: pathlib.Path, content: bytes) -> None:
    """The file whole or not at all: what a killed build leaves of it stays in the work folder."""
    temporary = work / "unfinished"
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        remedy = f"can't be written ({error.strerror}); then give the command again: it continues"
        raise BadInput("data build --out", str(file), remedy) from None


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ 1 tokenizer


def _tokenizer(
    work: pathlib.Path,
    out: pathlib.Path,
    reference: str,
    found: list[inputs.Input],
    text_field: str,
    held_out: float,
    advance: Advance,
) -> tokenizers.Tokenizer:
    if reference == "bytes":
        return tokenizers.Bytes()
    file = out / "tokenizer.json"
    if not file.exists():
        if reference.startswith("bpe:"):
            sample = _sample(found, text_field, held_out, advance)
            advance("training the tokenizer", 0.0)
            _write(work, file, tokenizers.train_bpe(sample, int(reference.removeprefix("bpe:"))).encode())
        else:
            _write(work, file, pathlib.Path(reference).read_bytes())
    return tokenizers.load(str(file), "data build --tokenizer")


def _sample(found: list[inputs.Input], text_field: str, held_out: float, advance: Advance) -> list[str]:
    """Training documents for the tokenizer: those of the largest hashes, as many as fit `SAMPLE_BYTES`."""
    heap: list[tuple[bytes, bytes]] = []
    size = 0
    for document in _read(found, text_field, "reading for the tokenizer", advance):
        digest = hashlib.sha256(document).digest()
        if not text.held_out(digest, held_out) and (size < SAMPLE_BYTES or digest > heap[0][0]):
            heapq.heappush(heap, (digest, document))
            size += len(document)
            while size > SAMPLE_BYTES and len(heap) > 1:
                size -= len(heapq.heappop(heap)[1])
    return [document.decode() for _, document in sorted(heap)]


# ------------------------------------------------------------------------------------------------ 2 parts


def _read(found: list[inputs.Input], text_field: str, what: str, advance: Advance) -> Iterator[bytes]:
    total = sum(item.size for item in found) or 1
    before = 0
    for item in found:
        for document, share in item.documents(text_field):
            advance(what, (before + share * item.size) / total)
            yield document
        before += item.size


def _parts(
    work: pathlib.Path,
    found: list[inputs.Input],
    encoder: tokenizers.Tokenizer,
    text_field: str,
    part_bytes: int,
    advance: Advance,
) -> list[int]:
    """Tokenizes what isn't yet; returns each input's number of parts. A part is complete once its `.npy` is there."""
    counts = []
    for number, item in enumerate(found):
        finished = work / f"input-{number:05}.json"
        if not finished.exists():
            stem = f"part-{number:05}-"
            part = len(list(work.glob(f"{stem}*.npy")))
            skip = sum(len(np.load(work / f"{stem}{k:06}.npy", mmap_mode="r")) for k in range(part))
            waiting: list[bytes] = []
            size = 0
            what = f"tokenizing {pathlib.Path(item.name).name} ({number + 1}/{len(found)})"
            for document in _read([item], text_field, what, advance):
                if skip:
                    skip -= 1
                    continue
                waiting.append(document)
                size += len(document)
                if size >= part_bytes:
                    _write_part(work, f"{stem}{part:06}", waiting, encoder)
                    waiting, size, part = [], 0, part + 1
            if waiting:
                _write_part(work, f"{stem}{part:06}", waiting, encoder)
                part += 1
            _write(work, finished, json.dumps(part).encode())
        counts.append(json.loads(finished.read_text()))
    return counts


def _write_part(work: pathlib.Path, stem: str, documents: list[bytes], encoder: tokenizers.Tokenizer) -> None:
    encoded = encoder.encode_documents(documents)
    table = np.empty(len(documents), _DOCUMENT)
    for row, document, ids in zip(table, documents, encoded, strict=True):
        digest = hashlib.sha256(document).digest()
        row["digest"] = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
        row["tokens"], row["bytes"] = len(ids), len(document)
    tokens = np.concatenate(encoded).astype(_dtype(encoder))
    _write(work, work / f"{stem}.bin", tokens.tobytes())
    _write(work, work / f"{stem}.npy", _npy(table))


def _dtype(encoder: tokenizers.Tokenizer) -> np.dtype[Any]:
    return np.dtype(tokenizers.dtype_for(encoder.vocab_size)).newbyteorder("<")


# ------------------------------------------------------------------------------------------------ 3 shards


def _shards(
    out: pathlib.Path,
    work: pathlib.Path,
    encoder: tokenizers.Tokenizer,
    found: list[inputs.Input],
    counts: list[int],
    options: dict[str, Any],
    advance: Advance,
) -> None:
    stems = [work / f"part-{number:05}-{part:06}" for number, count in enumerate(counts) for part in range(count)]
    if not stems:
        raise BadInput(inputs.FIELD, ", ".join(item.name for item in found), "holds no text")
    tables = [np.load(stem.with_suffix(".npy")) for stem in stems]
    documents = np.concatenate(tables)
    part = np.repeat(np.arange(len(stems)), list(map(len, tables)))
    start = np.concatenate([np.cumsum(table["tokens"]) - table["tokens"] for table in tables])
    dtype = _dtype(encoder)
    tokens = [
        np.memmap(stem.with_suffix(".bin"), dtype, "r") if table["tokens"].any() else np.empty(0, dtype)
        for stem, table in zip(stems, tables, strict=True)
    ]

    def ids(i: int) -> np.ndarray:
        return tokens[part[i]][start[i] : start[i] + documents["tokens"][i]]

    train, held = _split(documents, options["held_out"], options["seed"])
    if not len(train):
        remedy = f"too little text for a training and a held-out document ({len(documents)} documents)"
        raise BadInput(inputs.FIELD, ", ".join(item.name for item in found), remedy)
    scored = [i for i in held.tolist() if _survives(encoder, documents[i], ids(i))]
    if not scored:
        remedy = (
            "gives none of the held-out documents back, so bits per byte would mean nothing; use one with byte fallback"
        )
        raise BadInput("data build --tokenizer", options["tokenizer"], remedy)
    limit, bos = options["shard_tokens"], encoder.bos
    written: dict[str, Any] = {}
    for split, order in (("train", train), ("held_out", np.array(scored))):
        groups = _groups(documents["tokens"][order] + 1, limit)
        written[split] = []
        for number, (first, last) in enumerate(groups):
            advance(f"writing {split} shards", number / len(groups))
            file, note = out / f"{split}-{number:05}.bin", work / f"{split}-{number:05}.json"
            if not note.exists():  # written after the shard
                stream = _stream([ids(i) for i in order[first:last]], bos, dtype)
                _write(work, file, stream.tobytes())
                _write(work, note, json.dumps(_entry(file) | {"tokens": len(stream)}).encode())
            written[split].append(json.loads(note.read_text()))
    table = np.stack([documents["tokens"][scored], documents["bytes"][scored]], axis=1).astype("<i8")
    _write(work, out / "held_out.npy", _npy(table))
    fingerprint = encoder.fingerprint
    document = {
        "schema": shards.SCHEMA,
        "tokenizer": fingerprint,
        "tokenizer_file": None if fingerprint == "bytes" else _entry(out / "tokenizer.json"),
        "vocab_size": encoder.vocab_size,
        "bos": bos,
        "dtype": dtype.str,
        "documents": len(documents),
        "bytes": int(documents["bytes"].sum()),
        "train": written["train"],
        "held_out": written["held_out"],
        "held_out_documents": _entry(out / "held_out.npy")
        | {"documents": len(scored), "lossy": len(held) - len(scored)},
        "options": options,
        "inputs": [pathlib.Path(item.name).name for item in found],
        "plan": _plan_hash(json.loads((work / "plan.json").read_text(encoding="utf-8"))),
    }
    document["content"] = shards.content(document)
    advance("done", 1.0)
    _write(work, out / "manifest.json", (json.dumps(document, indent=1) + "\n").encode())


def _split(documents: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training documents, shuffled, and of the held-out ones, in hash order, of equal ones the first."""
    digest = documents["digest"].astype(np.uint64)
    by_hash = np.lexsort((digest[:, 1], digest[:, 0]))
    held = digest[:, 0] < np.uint64(share * 2**64)
    if not held.any():  # a small corpus: its first document by hash, with its copies
        held = (digest == digest[by_hash[0]]).all(axis=1)
    candidates = by_hash[held[by_hash]]
    copy = np.concatenate(([False], (digest[candidates[1:]] == digest[candidates[:-1]]).all(axis=1)))
    train = np.flatnonzero(~held)
    draw = np.random.Philox(key=seed).random_raw(len(train))
    return train[np.argsort(draw, kind="stable")], candidates[~copy]


def _survives(encoder: tokenizers.Tokenizer, document: np.ndarray, ids: np.ndarray) -> bool:
    if encoder.lossless:
        return True
    digest = hashlib.sha256(encoder.decode(ids).encode()).digest()[:16]
    return digest == document["digest"].astype(">u8").tobytes()


def _groups(lengths: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Consecutive runs of at most `limit` tokens, at least one document each."""
    ends = np.cumsum(lengths)
    groups, first = [], 0
    while first < len(lengths):
        room = limit + (ends[first - 1] if first else 0)
        last = max(first + 1, int(np.searchsorted(ends, room, "right")))
        groups.append((first, last))
        first = last
    return groups


def _stream(documents: list[np.ndarray], bos: int, dtype: np.dtype[Any]) -> np.ndarray:
    """bos document bos document ..."""
    stream = np.full(sum(map(len, documents)) + len(documents), bos, dtype)
    start = 1
    for document in documents:
        stream[start : start + len(document)] = document
        start += len(document) + 1
    return stream


def _entry(file: pathlib.Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": shards.sha256(file)}


# ------------------------------------------------------------------------------------------------ progress


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Advance]:
    """One bar, on the error stream, that says what is being done."""
    if not progress:
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=1.0)
        current, shown = "", 0.0

        def advance(what: str, share: float) -> None:
            nonlocal current, shown
            if what != current:
                bar.reset(task, description=what, total=1.0)
                current, shown = what, 0.0
            if share >= shown:  # a thousand times at most: there may be millions of documents
                bar.update(task, completed=share)
                shown = share + 1e-3

        yield advance
