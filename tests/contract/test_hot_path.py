"""No blocking device read while training.

Counted with the profiler, and by watching every way in which Python can read a tensor.
"""

import contextlib
import sys
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training_tasks import TASKS, build, digits, train

from lightning_spike import GradNormMonitor, suite
from lightning_spike.callbacks.base import SpikeCallback

BLOCKING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
)
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")
HOT = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
ALLOWED = "lightning_spike/record/recorder.py"
"""The one file that turns device values into numbers, once they are on the host."""


def profiled_counts(task, callbacks, root):
    module, options = build(task)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        train(module, callbacks, root, **options)
    counts = Counter({e.key: e.count for e in recorded.key_averages()})
    return {name: counts[name] for name in BLOCKING}


@pytest.mark.parametrize("task", ["cnn", "two_by_hand"])
def test_the_profiler_counts_no_read_more_than_without_the_suite(task, tmp_path):
    plain = profiled_counts(task, [], tmp_path)
    watched = profiled_counts(task, suite(dirpath=tmp_path / "spike"), tmp_path)
    assert watched == plain


class NoBlockingOperation(TorchDispatchMode):
    """Fails on operations whose result Python, or the size of whose result the host, must wait for.

    And on copies that wait.
    """

    REFUSED = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "masked_select",
        "_unique2",
        "unique_dim",
        "bincount",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        if name == "index":
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), (
                "a boolean mask waits for the device"
            )
        if name == "_to_copy" and kwargs.get("device") is not None:
            assert kwargs.get("non_blocking") or kwargs["device"] == args[0].device, "a blocking copy to another device"
        return func(*args, **kwargs)


@contextlib.contextmanager
def reads_are_watched(monkeypatch, seen):
    for name in READS:
        original = getattr(torch.Tensor, name)

        def watched(self, *args, _original=original, _name=name, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if "lightning_spike/" in caller and not caller.endswith(ALLOWED):
                seen.append((_name, caller))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    yield


@pytest.mark.parametrize("task", TASKS)
def test_no_hook_of_ours_reads_a_tensor_or_runs_an_operation_that_waits(task, tmp_path, monkeypatch):
    seen, calls = [], Counter()
    for hook in HOT:
        original = getattr(SpikeCallback, hook)

        def guarded(self, *args, _original=original, _hook=hook, **kwargs):
            calls[_hook] += 1
            with NoBlockingOperation():
                _original(self, *args, **kwargs)

        monkeypatch.setattr(SpikeCallback, hook, guarded)
    module, options = build(task)
    callbacks = suite(dirpath=tmp_path / "spike")
    with reads_are_watched(monkeypatch, seen):
        train(module, callbacks, tmp_path, **options)
    assert seen == []
    assert all(calls[hook] > 0 for hook in HOT)
    store = callbacks[0].flight.store
    assert store.disabled == []
    assert store.episodes == (), "the hot path is that of a run without trouble"


def test_the_watch_itself_notices_a_read(tmp_path, monkeypatch):
    """The test of the test: a participant that reads is caught."""

    class Reads(GradNormMonitor):
        def sense_batch(self, batch):
            super().sense_batch(batch)
            float(next(batch.module.parameters()).detach().sum())

    callback = Reads()
    original = SpikeCallback.on_train_batch_start

    def guarded(self, *args):
        with NoBlockingOperation():
            original(self, *args)

    monkeypatch.setattr(SpikeCallback, "on_train_batch_start", guarded)
    module, options = build("cnn")
    with pytest.warns(UserWarning, match="waits for the device"):
        train(module, [callback], tmp_path, **options, max_epochs=1)
    assert [d.part for d in callback.flight.store.disabled] == ["Reads"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_hook_synchronises(tmp_path, monkeypatch):
    for hook in HOT:
        original = getattr(SpikeCallback, hook)

        def guarded(self, *args, _original=original):
            torch.cuda.set_sync_debug_mode("error")
            try:
                _original(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(SpikeCallback, hook, guarded)
    module, options = build("cnn")
    callbacks = suite(dirpath=tmp_path / "spike")
    train(module, callbacks, tmp_path, dataset=digits(1024), **(options | {"accelerator": "cuda", "devices": 1}))
    assert callbacks[0].flight.store.disabled == []
