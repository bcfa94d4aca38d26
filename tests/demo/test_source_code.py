import zlib

import pytest
import torch

from lightning_spike.demo.source_code import ByteWindows, SourceCodeData


def _ready(**options):
    data = SourceCodeData(**{"train_files": 20, "val_files": 2, **options})
    data.setup("fit")
    return data


def _bytes_of(data, index):
    window, following = data.train_set[index]
    return bytes([*window.tolist(), following[-1].item()])


def test_windows_tile_each_file_and_never_span_two():
    windows = ByteWindows([b"abcdefg", b"ABCDE"], context=2)
    assert [bytes(windows[i][0].tolist()) for i in range(len(windows))] == [b"ab", b"cd", b"ef", b"AB", b"CD"]
    assert [bytes(windows[i][1].tolist()) for i in range(len(windows))] == [b"bc", b"de", b"fg", b"BC", b"DE"]
    assert windows.file_of == [0, 0, 0, 1, 1]


def test_windows_are_the_bytes_of_the_files_in_the_order_of_the_stream():
    data = _ready()
    per_file = (data.file_bytes - 1) // data.context
    assert len(data.train_set) == 20 * per_file
    for file, path in enumerate(data.train_paths):
        assert _bytes_of(data, file * per_file) == path.read_bytes()[: data.context + 1]


def test_exactly_the_corrupt_indices_are_not_the_files_own_bytes():
    clean, corrupt = _ready(), _ready(corrupt_files=3)
    assert corrupt.train_paths == clean.train_paths
    differing = [
        i for i in range(len(clean.train_set)) if not torch.equal(clean.train_set[i][0], corrupt.train_set[i][0])
    ]
    assert differing == corrupt.corrupt_indices
    assert min(differing) >= len(clean.train_set) // 2
    assert len({corrupt.train_set.file_of[i] for i in differing}) == 3


def test_a_corrupt_file_begins_with_its_compressed_form():
    data = _ready(corrupt_files=1)
    first = data.corrupt_indices[0]
    path = data.train_paths[data.train_set.file_of[first]]
    assert _bytes_of(data, first) == zlib.compress(path.read_bytes())[: data.context + 1]


def test_the_same_seed_gives_the_same_stream_and_another_one_another():
    assert _ready(seed=3).train_paths == _ready(seed=3).train_paths
    assert _ready(seed=3).train_paths != _ready(seed=4).train_paths


def test_training_and_validation_share_no_file():
    data = _ready()
    per_file = (data.file_bytes - 1) // data.context
    train = {data.train_set[i][0].numpy().tobytes() for i in range(0, len(data.train_set), per_file)}
    assert not train & {data.val_set[i][0].numpy().tobytes() for i in range(0, len(data.val_set), per_file)}


def test_more_files_than_there_are_is_an_error_that_counts_them():
    with pytest.raises(FileNotFoundError, match="10002 files of at least 4097 bytes are needed"):
        _ready(train_files=10000)


@pytest.mark.parametrize("corrupt_files", [-1, 11])
def test_corrupt_files_beyond_the_second_half_are_refused(corrupt_files):
    with pytest.raises(ValueError, match="expected 0 to 10"):
        SourceCodeData(train_files=20, corrupt_files=corrupt_files)
