import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_spike.demo.digits import DigitsData


def _ready(**options):
    data = DigitsData(**options)
    data.setup("fit")
    return data


def test_the_splits_hold_every_image_once():
    data = _ready()
    images = torch.cat([data.train_set.tensors[0], data.val_set.tensors[0]]).flatten(1).numpy() * 16
    assert sorted(map(tuple, images)) == sorted(map(tuple, load_digits().data.astype(np.float32)))


def test_labels_stay_with_their_images():
    data = _ready()
    of_image = {tuple(image): label for image, label in zip(load_digits().data, load_digits().target, strict=True)}
    for image, label in zip(*data.val_set.tensors, strict=True):
        assert of_image[tuple((image.flatten() * 16).tolist())] == label


def test_fewer_training_images_leave_validation_as_it_is():
    few, all_ = _ready(train_images=80), _ready()
    assert len(few.train_set) == 80
    assert torch.equal(few.val_set.tensors[0], all_.val_set.tensors[0])


def test_batches_have_the_documented_shape():
    images, labels = next(iter(_ready(batch_size=7).train_dataloader()))
    assert (images.shape, images.dtype) == ((7, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((7,), torch.int64)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    "options", [{"train_images": 1438}, {"val_images": 0}, {"val_images": 1797}, {"train_images": -1}]
)
def test_splits_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="do not fit into 1797"):
        DigitsData(**options)
