"""Writes files and folders atomically, even if the process ends while writing."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes one file atomically and waits until it is on the disk.

    Args:
        path: Path of the file; its folder is made if missing, and an existing file is replaced in one step.
        content: Content of the file; text is written as UTF-8 with its line ends unchanged.

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
    """Yields a handle whose content appears under `path` when the block ends, and not if it raises.

    The bytes are written to a hidden file in the same folder, synced to the disk, and renamed: a rename is atomic
    inside one file system only. A killed process leaves only that file (`.<name>.<random>.tmp`).

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
    """Yields an empty folder that appears under `path` when the block ends, and not if it raises.

    An existing folder at `path` is replaced as a whole: moved aside, and removed after the rename. A reader finds the
    old one, the new one or none, never a mixture. The files are synced to the disk.

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
    if not path.is_dir():  # an existing plain file makes `rename` raise, as it should
        folder.rename(path)
        return
    old = path.rename(_hidden_neighbour(path))
    folder.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _hidden_neighbour(path: Path) -> Path:
    # `secrets` uses the system's randomness and leaves the training's random state unchanged.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync_file(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    """Syncs a rename in this folder to the disk; only POSIX can open a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
