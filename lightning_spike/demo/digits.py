"""The handwritten digits that come with scikit-learn: 1797 real images of 8 x 8 pixels, no download."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_spike.errors import MissingExtraError

_IMAGES = 1797
_BRIGHTEST = 16.0


class DigitsData(LightningDataModule):
    """Scikit-learn's digits, split into training and validation images.

    A batch is the pair ``(images, labels)``: images float32 of shape ``(B, 1, 8, 8)`` with values from 0 to 1, labels
    int64 of shape ``(B,)``.

    Args:
        batch_size: Images per batch, in training and validation.
        train_images: How many of the training images to use. Below about 100 a network learns them by heart; None
            uses all that validation leaves.
        val_images: Images held back for validation; the same ones whatever `train_images` is.
        split_seed: Seed of the split.

    Raises:
        ValueError: If the two splits do not fit into the 1797 images, or one is empty.
    """

    def __init__(
        self, *, batch_size: int = 64, train_images: int | None = None, val_images: int = 360, split_seed: int = 0
    ) -> None:
        super().__init__()
        available = _IMAGES - val_images
        if not 0 < val_images < _IMAGES or not 0 < (train_images or available) <= available:
            msg = (
                f"{train_images} training and {val_images} validation images do not fit into {_IMAGES}, each at least 1"
            )
            raise ValueError(msg)
        self.batch_size = batch_size
        self.train_images = train_images or available
        self.val_images = val_images
        self.split_seed = split_seed

    @override
    def setup(self, stage: str) -> None:
        """Read the images and split them; the same split each time.

        Raises:
            MissingExtraError: If scikit-learn is not installed.
        """
        images, labels = _load_digits()
        order = torch.randperm(_IMAGES, generator=torch.Generator().manual_seed(self.split_seed))
        val, train = order[: self.val_images], order[self.val_images :][: self.train_images]
        self.train_set = TensorDataset(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])

    @override
    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Shuffled batches; the last one may be smaller."""
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """The validation images in their order."""
        return DataLoader(self.val_set, batch_size=self.batch_size)


def _load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images, float32 ``(1797, 1, 8, 8)`` in [0, 1], and their labels, int64 ``(1797,)``."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise MissingExtraError.of("DigitsData", extra="demo", package="scikit-learn") from error
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / _BRIGHTEST
    return images, torch.as_tensor(digits.target, dtype=torch.int64)
