"""The Python standard library's own source files as a stream of bytes: real text on every machine, no download."""

import random
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

_LEFT_OUT = frozenset({"dist-packages", "encodings", "pydoc_data", "site-packages", "test", "tests"})
"""Folders that are not the library's own program text: installed packages, tables, generated help, tests."""


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Fixed windows over the bytes of several files, in the order of the files.

    An item is ``(bytes, next_bytes)``, both int64 of shape ``(context,)``, the second shifted by one byte. A window
    never spans two files, so that an index belongs to exactly one of them.

    Args:
        files: The bytes of each file; what does not fill a last window is left out.
        context: Bytes per window.
    """

    def __init__(self, files: Sequence[bytes], *, context: int) -> None:
        self.context = context
        self.file_of: list[int] = []
        windows: list[Tensor] = []
        for number, content in enumerate(files):
            count = (len(content) - 1) // context
            self.file_of += [number] * count
            windows += [
                torch.frombuffer(bytearray(content[i * context : (i + 1) * context + 1]), dtype=torch.uint8)
                for i in range(count)
            ]
        self._windows = torch.stack(windows)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._windows)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of one window and the bytes that follow each of them."""
        window = self._windows[index].long()
        return window[:-1], window[1:]


class SourceCodeData(LightningDataModule):
    """Source files of the standard library as a language-modelling task on bytes.

    The files are read in a shuffled order, each once per epoch and each in one piece, as a training on a stream of
    documents does.
    Asked to, it makes some files corrupt: in their place stands their compressed form, as if an archive had been taken
    for text.

    Args:
        batch_size: Windows per batch.
        context: Bytes per window.
        train_files: Number of training files.
        val_files: Number of validation files, none of them corrupt.
        file_bytes: How much of each file is used, from its start; shorter files are not taken.
        corrupt_files: How many training files are corrupt. They lie in the second half of the stream, after the loss
            has come down, one at a random place in each of as many equal stretches.
        seed: Seed of the order of the files and of the choice of the corrupt ones.

    Raises:
        ValueError: If more files are to be corrupt than the second half holds.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        context: int = 128,
        train_files: int = 120,
        val_files: int = 8,
        file_bytes: int = 4097,
        corrupt_files: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= corrupt_files <= train_files // 2:
            msg = f"corrupt_files: expected 0 to {train_files // 2}, half of train_files, was given {corrupt_files}"
            raise ValueError(msg)
        self.batch_size = batch_size
        self.context = context
        self.train_files = train_files
        self.val_files = val_files
        self.file_bytes = file_bytes
        self.corrupt_files = corrupt_files
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        """Read the files, in the order of the stream, and put corrupt ones where asked.

        Raises:
            FileNotFoundError: If this Python has not enough source files of that length.
        """
        paths = self._choose_files()
        train, val = paths[: self.train_files], paths[self.train_files :]
        self.corrupt_paths = self._choose_corrupt(train)
        contents = [_compressed(path) if path in self.corrupt_paths else path.read_bytes() for path in train]
        self.train_paths = train
        self.train_set = ByteWindows([content[: self.file_bytes] for content in contents], context=self.context)
        self.val_set = ByteWindows([path.read_bytes()[: self.file_bytes] for path in val], context=self.context)

    @property
    def corrupt_indices(self) -> list[int]:
        """Indices of the training set whose window lies in a corrupt file; known after `setup`."""
        return [
            index for index, file in enumerate(self.train_set.file_of) if self.train_paths[file] in self.corrupt_paths
        ]

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The stream in its order."""
        return DataLoader(self.train_set, batch_size=self.batch_size)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The validation files in their order."""
        return DataLoader(self.val_set, batch_size=self.batch_size)

    def _choose_files(self) -> list[Path]:
        needed = self.train_files + self.val_files
        library = Path(sysconfig.get_path("stdlib"))
        sources = (
            path for path in sorted(library.rglob("*.py")) if _LEFT_OUT.isdisjoint(path.relative_to(library).parts)
        )
        long_enough = [path for path in sources if path.stat().st_size >= self.file_bytes]
        if len(long_enough) < needed:
            msg = f"{needed} files of at least {self.file_bytes} bytes are needed; {library} has {len(long_enough)}"
            raise FileNotFoundError(msg)
        return random.Random(self.seed).sample(long_enough, needed)  # noqa: S311 - an order, not a secret

    def _choose_corrupt(self, train: list[Path]) -> frozenset[Path]:
        if not self.corrupt_files:
            return frozenset()
        second_half = train[len(train) // 2 :]
        stretch = len(second_half) / self.corrupt_files
        place = random.Random(self.seed)  # noqa: S311 - a place, not a secret
        return frozenset(second_half[int((i + place.random()) * stretch)] for i in range(self.corrupt_files))


def _compressed(path: Path) -> bytes:
    """Return the compressed form, repeated until it is as long as the file."""
    content = path.read_bytes()
    packed = zlib.compress(content)
    return (packed * (len(content) // len(packed) + 1))[: len(content)]
