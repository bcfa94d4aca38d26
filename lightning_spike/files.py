"""Files and folders that are there whole or not at all, however the process ends in the middle of writing."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write one file whole or not at all, and wait until it is on the disk.

    Args:
        path: Where to; its folder is made where missing, a file already there is replaced in one step.
        content: What to write; text is written as UTF-8 with its line ends as they are.

    Returns:
        `path`.

    Raises:
        OSError: It could not be written; what was there before is untouched.
    """
    with whole_file(path) as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A handle to write to, whose content appears under `path` when the block ends well, and never where it raises.

    The bytes go to a hidden file in the same folder (a rename is atomic only inside one file system), are synced to the
    disk, and then renamed. A process that is killed on the way leaves only that hidden file (`.<name>.<random>.tmp`).

    Raises:
        OSError: It could not be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = _hidden_neighbour(path)
    try:
        with hidden.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        hidden.replace(path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which appears under `path` when the block ends well, and never where it raises.

    A folder already at `path` is replaced as a whole: moved aside, and removed once the new one stands in its place, so
    that a reader finds the old one, the new one or none, never a mixture. The files in it are synced to the disk here.

    Raises:
        OSError: It could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = _hidden_neighbour(path)
    hidden.mkdir()
    try:
        yield hidden
        for file in hidden.rglob("*"):
            _sync_folder(file) if file.is_dir() else _sync_file(file)
        _sync_folder(hidden)
        _put_in_place(hidden, path)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _put_in_place(folder: Path, path: Path) -> None:
    if not path.is_dir():  # a plain file in the way makes `rename` raise, as it should: it is not ours to remove
        folder.rename(path)
        return
    old = path.rename(_hidden_neighbour(path))
    folder.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _hidden_neighbour(path: Path) -> Path:
    # `secrets` asks the system: the random state of a training run is not ours to move.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync_file(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename in this folder outlive a power cut; only POSIX can open a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
