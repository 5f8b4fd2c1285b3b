"""What `scalelab data build` reads: files and Hugging Face data sets, as documents.

.txt: a file is a document; fewer than 64 of them are cut into pieces (see `text`). .jsonl, .jsonl.gz, .jsonl.zst,
.parquet: a row is a document, its text in one field. A folder stands for the files of those kinds in it, hidden ones
out, or, where `save_to_disk` wrote it, for its data set. `hf:NAME` or `hf:NAME:SPLIT` is a data set of the hub.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import mmap
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from scalelab.data import text
from scalelab.errors import BadInput, FeatureMissing

# Fewer text files than this are cut in pieces, so that there is something to hold out; otherwise a file is a document.
FEW_FILES = 64
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FIELD = "data build INPUT"

Document = tuple[bytes, float]  # UTF-8 text, and the share of the input that has been read with it


@dataclasses.dataclass(frozen=True)
class Input:
    """One file or data set. `state` changes when its content does (size and time, or a fingerprint)."""

    name: str
    kind: str  # one of SUFFIXES, "saved" or "hf"
    size: int  # bytes, or rows of a data set
    state: str
    piece: int = 0  # of .txt: bytes of the pieces that it is cut into; 0: whole

    def documents(self, text_field: str) -> Iterator[Document]:
        """In order; empty ones are left out. Raises `BadInput` that names the file and the place in it."""
        if self.kind == ".txt":
            found = _txt(self)
        elif self.kind.startswith(".jsonl"):
            found = _jsonl(self, text_field)
        elif self.kind == ".parquet":
            found = _parquet(self, text_field)
        else:
            found = _hugging_face(self, text_field)
        return ((document, share) for document, share in found if document)


def find(names: Iterable[str]) -> list[Input]:
    """The inputs of a build, in the order given, folders by name. Raises `BadInput` for what can't be one."""
    found: list[Input] = []
    for name in names:
        path = pathlib.Path(name)
        if name.startswith("hf:"):
            dataset = _dataset(name)
            found.append(Input(name, "hf", len(dataset), dataset._fingerprint))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = _dataset(name)
            found.append(Input(name, "saved", len(dataset), dataset._fingerprint))
        elif path.is_dir():
            files = [file for file in text.files(path, FIELD) if _kind(file)]
            if not files:
                raise BadInput(FIELD, name, f"holds no file of a kind that can be read: {', '.join(SUFFIXES)}")
            found += map(_file, files)
        elif not path.is_file():
            raise BadInput(FIELD, name, "no such file or folder (a data set of the hub is written hf:NAME)")
        elif not _kind(path):
            raise BadInput(FIELD, name, f"must end in one of {', '.join(SUFFIXES)}")
        else:
            found.append(_file(path))
    if not found:
        raise BadInput(FIELD, "", "name at least one file, folder or data set")
    plain = [item for item in found if item.kind == ".txt"]
    if len(plain) < FEW_FILES:
        piece = text.piece_size(sum(item.size for item in plain), FEW_FILES, 1024)
        found = [dataclasses.replace(item, piece=piece) if item.kind == ".txt" else item for item in found]
    return found


def _kind(path: pathlib.Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _file(path: pathlib.Path) -> Input:
    stat = path.stat()
    return Input(str(path), _kind(path), stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}")


def _open(item: Input) -> io.BufferedReader:
    try:
        return open(item.name, "rb")
    except OSError as error:
        raise BadInput(FIELD, item.name, f"can't be read: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------ kinds


def _txt(item: Input) -> Iterator[Document]:
    if not item.size:
        return
    with _open(item) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 0
        for piece in text.pieces(content, item.piece or item.size):
            try:
                piece.decode()
            except UnicodeDecodeError as error:
                remedy = f"must be UTF-8 text; it is not, at byte {start + error.start}"
                raise BadInput(FIELD, item.name, remedy) from None
            start += len(piece)
            yield piece, start / item.size


def _jsonl(item: Input, text_field: str) -> Iterator[Document]:
    number = 0
    with _open(item) as raw:
        try:
            for number, line in enumerate(_lines(raw, item.kind), 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise BadInput(FIELD, item.name, f"line {number} is not JSON in UTF-8 ({error})") from None
                yield _text(record, text_field, item, f"line {number}"), raw.tell() / item.size
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(FIELD, item.name, f"is cut or damaged after line {number} ({error})") from None


def _lines(raw: io.BufferedReader, kind: str) -> Iterable[bytes]:
    if kind == ".jsonl.gz":
        return gzip.GzipFile(fileobj=raw)
    return _zstd_lines(raw) if kind == ".jsonl.zst" else raw


def _zstd_lines(raw: io.BufferedReader) -> Iterator[bytes]:
    """Frame by frame, since zstandard's own reader takes a cut file for a whole one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    begun, rest = False, b""
    while block := raw.read(2**20):
        while block:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                rest += frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            begun, block = True, frame.unused_data
            *lines, rest = rest.split(b"\n")
            yield from lines
    if begun and not frame.eof:
        raise EOFError("the compressed stream ends early")
    yield rest


def _parquet(item: Input, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise FeatureMissing("reading .parquet", "pyarrow", "parquet") from None
    try:
        with pyarrow.parquet.ParquetFile(item.name) as file:
            rows = file.metadata.num_rows
            if text_field not in file.schema_arrow.names:
                raise _no_field(item, text_field, file.schema_arrow.names, "its columns")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text({text_field: value}, text_field, item, f"row {row}"), row / rows
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(FIELD, item.name, f"can't be read as Parquet ({error})") from None


def _hugging_face(item: Input, text_field: str) -> Iterator[Document]:
    dataset = _dataset(item.name)
    if text_field not in dataset.column_names:
        raise _no_field(item, text_field, dataset.column_names, "its columns")
    for row, record in enumerate(dataset.select_columns(text_field), 1):
        yield _text(record, text_field, item, f"row {row}"), row / len(dataset)


def _dataset(name: str) -> Any:
    """A `datasets.Dataset`: one saved on disk, or `hf:NAME[:SPLIT]`; of several splits, `train`."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise FeatureMissing(f"reading {name}", "datasets", "hf") from None
    try:
        if name.startswith("hf:"):
            _, path, *split = name.split(":")
            return datasets.load_dataset(path, split=split[0] if split else "train")
        dataset = datasets.load_from_disk(name)
    except Exception as error:  # whatever the library, the file system or the network says
        line = str(error).strip().partition("\n")[0]
        raise BadInput(FIELD, name, f"can't be loaded ({type(error).__name__}: {line})") from None
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise BadInput(FIELD, name, f"has no split `train`; name the folder of one: {', '.join(map(str, dataset))}")
        return dataset["train"]
    return dataset


def _text(record: Any, text_field: str, item: Input, place: str) -> bytes:
    if not isinstance(record, dict) or text_field not in record:
        raise _no_field(item, text_field, record if isinstance(record, dict) else (), f"the fields of {place}")
    value = record[text_field]
    if not isinstance(value, str):
        raise BadInput(FIELD, item.name, f"{place}: field {text_field} must be a string, not {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise BadInput(FIELD, item.name, f"{place}: field {text_field} is not text (a lone surrogate)") from None


def _no_field(item: Input, text_field: str, known: Iterable[str], what: str) -> BadInput:
    known = ", ".join(known) or "none"
    return BadInput("--text-field", text_field, f"{item.name} has no such field; {what}: {known}")
