"""The `text` source: UTF-8 files as documents, held in memory (for more text than that, build shards).

Path "" is the embedded corpus, Python's own standard library.

A document is a file. A corpus of fewer than `FEW_FILES` files is cut, at line ends, into about that many pieces that
act as documents (2 to 16 KiB each): one file has a held-out part too, and a held-out loss is the mean over many
documents instead of the luck of a few. For longer documents than that, build shards.

Documents stand in the order of the SHA-256 of their content, and those whose hash, read as a fraction, lies below
`HELD_OUT_SHARE` are held out: whether a document is held out depends on nothing but what it says, so copies of it,
in this source or another, can't leak into training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
import pathlib
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np

from scalelab.data import tokenizers
from scalelab.data.stream import TokenSource
from scalelab.errors import BadInput
from scalelab.paths import cache_folder

HELD_OUT_SHARE = 0.03  # of the documents, by hash
FEW_FILES = 4096
PIECE = 16 * 1024  # bytes

# Of the standard library: tests and what is installed next to it stay out. So does _sysconfigdata*.py, which the
# build of Python writes with the paths of the machine that it was built on.
_OUTSIDE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents in the order of their SHA-256; equal documents stay, next to each other.

    `skipped` counts files of the embedded corpus that are not UTF-8.
    """

    texts: list[bytes]
    digests: list[bytes]
    files: int
    skipped: int

    @property
    def content(self) -> str:
        """SHA-256 over all that is said, whatever the names of the files."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(map(len, self.texts))


def held_out(digest: bytes, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the document of this SHA-256 is held out: its first 8 bytes as a fraction of 2^64, below the share."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


def held_out_digests(digests: list[bytes], share: float = HELD_OUT_SHARE) -> set[bytes]:
    """The held-out documents of a sorted list. A small corpus that has none gives its first one."""
    return {digest for digest in digests if held_out(digest, share)} or set(digests[:1])


def read(path: str, field: str) -> Documents:
    """Reads and orders a corpus. Raises `BadInput` (naming `field`) if it is missing, empty or not UTF-8."""
    embedded = path == ""
    root = pathlib.Path(sysconfig.get_path("stdlib") if embedded else path)
    if embedded and not root.is_dir():
        raise BadInput(field, path, "this Python has no standard library as files; name a text file or folder")
    if not os.path.exists(root):
        raise BadInput(field, path, "no such file or folder")
    texts, count, skipped = [], 0, 0
    for file in _standard_library(root) if embedded else files(root, field):
        try:
            content = file.read_bytes()
            content.decode()
        except UnicodeDecodeError as error:
            if not embedded:
                remedy = f"must be UTF-8 text; {file} is not, at byte {error.start}"
                raise BadInput(field, path, remedy) from None
            skipped += 1
            continue
        except OSError as error:
            raise BadInput(field, path, f"can't read {file}: {error.strerror}") from None
        count += 1
        if content:
            texts.append(content)
    if not texts:
        raise BadInput(field, path, "holds no text" + ("" if count else "; no file that is not hidden"))
    if count < FEW_FILES:
        size = piece_size(sum(map(len, texts)))
        texts = [piece for text in texts for piece in pieces(text, size)]
    keyed = sorted(((hashlib.sha256(text).digest(), text) for text in texts), key=lambda pair: pair[0])
    return Documents([text for _, text in keyed], [digest for digest, _ in keyed], count, skipped)


def _standard_library(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _OUTSIDE)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield pathlib.Path(folder, name)


def files(root: pathlib.Path, field: str) -> Iterator[pathlib.Path]:
    """The file itself, or all files below a folder, hidden ones and hidden folders out."""
    if not root.is_dir():
        yield root
        return

    def unreadable(error: OSError) -> None:
        raise BadInput(field, str(root), f"can't read {error.filename}: {error.strerror}") from None

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and (file := pathlib.Path(folder, name)).is_file():
                yield file


def piece_size(total: int, wanted: int = FEW_FILES, least: int = 2048) -> int:
    """Bytes of the pieces that a corpus of few files, of so many bytes together, is cut into."""
    return min(PIECE, max(least, total // wanted))


def pieces(text: bytes | mmap.mmap, size: int) -> Iterator[bytes]:
    """Cuts at the last line end within `size` bytes; inside a longer line, between two characters."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line_end = text.rfind(b"\n", start, end) + 1
            end = line_end or end
            while end < len(text) and text[end] & 0xC0 == 0x80:  # inside a character
                end += 1
        yield text[start:end]
        start = end


def content(documents: Documents, tokenizer: tokenizers.Tokenizer) -> str:
    """What a run's id knows of the source: the text and the tokenizer, never the path."""
    return hashlib.sha256(f"text-1 {documents.content} {tokenizer.fingerprint}".encode()).hexdigest()


def tokenize(documents: Documents, held: set[bytes], tokenizer: tokenizers.Tokenizer, field: str) -> TokenSource:
    """Splits and encodes. `held`: digests that no training window may touch. `BadInput` if a side is empty."""
    pairs = list(zip(documents.digests, documents.texts, strict=True))
    train = [text for digest, text in pairs if digest not in held]
    unique = {digest: text for digest, text in pairs if digest in held}  # a copy is scored once
    if not train or not unique:
        remedy = f"is too small for a held-out document ({documents.bytes} bytes); name a longer text"
        raise BadInput(field, len(documents.texts), remedy)
    key = content(documents, tokenizer)
    parts, kept, sizes = _encode(train, list(unique.values()), tokenizer, key + "-" + _key(unique))
    if not kept:
        remedy = f"loses text of this source ({field}), so bits per byte would mean nothing; use one with byte fallback"
        raise BadInput("config.data.tokenizer", tokenizer.fingerprint, remedy)
    return TokenSource(
        tokenizer=tokenizer,
        parts=[parts],
        held_out=kept,
        held_out_bytes=sizes,
        lossy=len(unique) - len(kept),
        documents=len(documents.texts),
        bytes=documents.bytes,
        content=key,
        files=documents.files,
        skipped=documents.skipped,
    )


Encoded = tuple[np.ndarray, list[np.ndarray], list[int]]


def _encode(train: list[bytes], held: list[bytes], tokenizer: tokenizers.Tokenizer, key: str) -> Encoded:
    """The training stream, the held-out documents that survive the tokenizer, and their bytes; cached unless quick."""
    file = cache_folder() / "tokens" / f"{key}.npz"
    if tokenizer.fingerprint != "bytes" and file.is_file():
        try:
            with np.load(file) as stored:  # the zip's CRC notices damage
                stream, flat, lengths, sizes = (stored[name] for name in ("train", "held", "lengths", "sizes"))
            return stream, np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else [], sizes.tolist()
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError):
            pass  # damaged: made anew below
    dtype = tokenizers.dtype_for(tokenizer.vocab_size)
    encoded = tokenizer.encode_documents(train)
    stream = np.full(sum(map(len, encoded)) + len(encoded), tokenizer.bos, dtype)
    start = 1
    for document in encoded:
        stream[start : start + len(document)] = document
        start += len(document) + 1
    pairs = zip(tokenizer.encode_documents(held), held, strict=True)
    kept = [(ids, len(text)) for ids, text in pairs if tokenizers.survives(tokenizer, text, ids)]
    documents, sizes = [ids.astype(dtype) for ids, _ in kept], [size for _, size in kept]
    if tokenizer.fingerprint != "bytes":
        flat = np.concatenate(documents) if documents else np.empty(0, dtype)
        with contextlib.suppress(OSError):  # no room or no right to write there: the next run encodes again
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as temporary:
                np.savez(temporary, train=stream, held=flat, lengths=[len(ids) for ids in documents], sizes=sizes)
            os.replace(temporary.name, file)
    return stream, documents, sizes


def _key(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]
