"""Files: written whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterable

from scalelab.errors import BadInput


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> pathlib.Path:
    """The file has either its old content or all of the new, whatever happens. Makes the folders above it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def remove_leftovers(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Deletes what killed processes left of files of these names; no other may be writing them now."""
    for name in names:
        for temporary in folder.glob(f".{name}.*"):
            temporary.unlink()


def make_folder(path: str | os.PathLike[str], field: str) -> None:
    """Makes a folder that the user named, where it is missing; one that cannot be is `BadInput`."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # nothing that another name would mend
            raise
        raise BadInput(field, str(path), f"cannot be made a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInput(field, str(path), "cannot be written to; name another folder")


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/scalelab`, by default `~/.cache/scalelab`: compiled programs, encoded text."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "scalelab"


def save(path: str | os.PathLike[str], content: str | bytes, field: str = "path") -> pathlib.Path:
    """`write_atomically` to where the user asked for; what the system refuses is `BadInput`."""
    try:
        return write_atomically(path, content)
    except OSError as error:
        raise BadInput(field, str(path), f"cannot be written: {error.strerror}") from None


FIGURES = (".png", ".pdf", ".svg")


def check_figure(path: str, field: str) -> None:
    """Raises `BadInput` where no figure could be written, before the work that it is to show."""
    where = pathlib.Path(path)
    if where.suffix not in FIGURES:
        raise BadInput(field, path, f"must end in one of {', '.join(FIGURES)}")
    if where.is_dir() or not where.parent.is_dir():
        raise BadInput(field, path, "cannot be written: its folder does not exist, or it is one itself")
