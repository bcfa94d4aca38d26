import collections
import random

import numpy as np
import pytest
import torch
from lab.shapes import SHAPES, Ema, Plain
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_spike.errors import CannotReplay
from lightning_spike.sandbox.isolation import isolated, loss_of


class Trace(Callback):
    """Everything a training leaves behind that must not depend on whether the lab was at work."""

    def __init__(self):
        self.losses, self.metrics = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs.get("loss", torch.zeros(())).clone())
        self.metrics.append({k: v.clone() for k, v in trainer.callback_metrics.items()})


class Lab(Callback):
    """Runs the last batches again after every batch, as they come, with other weights, and with a failure at the
    end."""

    def __init__(self):
        self.runs = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with isolated(trainer, pl_module) as sandbox:
            for _ in range(2):
                loss_of(sandbox.step(batch, batch_idx)).backward()
            sandbox.rewind()
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.mul_(1.5)
            sandbox.step(batch, batch_idx)
            self.runs += 1
        with pytest.raises(RuntimeError, match="half way"), isolated(trainer, pl_module) as sandbox:  # noqa: PT012
            pl_module.eval()
            sandbox.step(batch, batch_idx)
            pl_module.net = None
            raise RuntimeError("half way")  # noqa: TRY003


def train(shape, tmp_path, *callbacks, **options):
    seed_everything(11, verbose=False)
    module, trace = shape(), Trace()
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": CSVLogger(tmp_path),
    }
    trainer = Trainer(callbacks=[*callbacks, trace], **(settings | options))
    trainer.fit(module)
    return trainer, module, trace


BY_KIND = [
    (torch.Tensor, lambda t: (tuple(t.shape), t.requires_grad, t.detach().contiguous().numpy().tobytes())),
    (np.ndarray, np.ndarray.tobytes),
    (torch.Generator, lambda g: g.get_state().numpy().tobytes()),
    (np.random.Generator, lambda g: repr(g.bit_generator.state)),
    (dict, lambda d: {str(k): remains(v) for k, v in d.items() if k != "_trainer"}),
    ((list, tuple, collections.deque), lambda items: [remains(v) for v in items]),
    (nn.Module, lambda module: remains(vars(module))),
    (torch.optim.Optimizer, lambda optimizer: remains(optimizer.state_dict())),
    ((int, float, str, set, type(None)), lambda value: value),
    (Ema.Average, lambda average: [average.count, remains(average.weights)]),
]


def remains(obj):
    """A comparable picture of an object.

    Bytes of tensors and arrays, the rest by value; what is none of these by its type.
    """
    look = next((look for kind, look in BY_KIND if isinstance(obj, kind)), lambda other: type(other).__name__)
    return look(obj)


def generators():
    legacy = np.random.get_state()[1].tobytes()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), legacy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_rest_of_the_training_is_bit_identical(shape, accumulate, tmp_path):
    pictures = []
    for name, callbacks in (("with", [Lab()]), ("without", [])):
        trainer, module, trace = train(
            shape, tmp_path / name, *callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=0.5
        )
        assert all(lab.runs == 10 for lab in callbacks)
        rows = (
            (tmp_path / name / "lightning_logs" / "version_0" / "metrics.csv").read_text() if trace.metrics[0] else ""
        )
        pictures.append(
            {
                "losses": remains(trace.losses),
                "metrics": remains(trace.metrics),
                "module": remains(module),
                "optimizer": remains(trainer.optimizers[0].state_dict()),
                "scheduler": remains(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
                "generators": generators(),
                "should_stop": trainer.should_stop,
                "rows": rows,
            }
        )
    assert pictures[0].keys() == pictures[1].keys()
    for key, with_lab in pictures[0].items():
        assert with_lab == pictures[1][key], key


def test_the_picture_would_show_a_training_step_that_is_run_once_more(tmp_path):
    class Careless(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:  # not at all of them: the mean of all batches, each twice, is the same mean
                pl_module.training_step(batch, batch_idx)

    for shape in SHAPES:
        if shape.__name__ in ("Plain", "LogsEverything"):  # without any state that a step changes
            continue
        (_, with_it, with_trace), (_, without, trace) = (
            train(shape, tmp_path / shape.__name__ / name, *callbacks)
            for name, callbacks in (("a", [Careless()]), ("b", []))
        )
        pictures = [
            [remains(part) for part in (module, traced.losses, traced.metrics)]
            for module, traced in ((with_it, with_trace), (without, trace))
        ]
        assert pictures[0] != pictures[1], shape.__name__


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_step_run_again_from_the_same_state_gives_the_same_loss_under_the_precision_of_the_run(precision, tmp_path):
    class Again(Callback):
        def __init__(self):
            self.pairs = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with isolated(trainer, pl_module) as sandbox:
                self.again = loss_of(sandbox.step(batch, batch_idx)).detach()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.pairs.append((self.again, outputs["loss"]))

    again = Again()
    train(next(s for s in SHAPES if s.__name__ == "NormAndDropout"), tmp_path, again, precision=precision)
    assert len(again.pairs) == 10
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in again.pairs)


def test_version_counters_do_not_tell_of_it_either(tmp_path):
    class Writes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = [t for entry in trainer.optimizers[0].state.values() for t in entry.values()]
            tensors = [*pl_module.parameters(), *pl_module.buffers(), *state]
            before = [t._version for t in tensors]
            with isolated(trainer, pl_module, with_optimizers=True) as sandbox, torch.no_grad():
                sandbox.step(batch, batch_idx)
                for tensor in tensors:
                    tensor.mul_(2)
                assert [t._version for t in tensors] != before
            assert [t._version for t in tensors] == before

    train(next(s for s in SHAPES if s.__name__ == "NormAndDropout"), tmp_path, Writes())


class FailsTheSecondTime(Plain):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        if batch_idx in self.seen:
            raise ValueError("this batch has been seen")  # noqa: TRY003
        self.seen.append(batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.seen.clear()


class OwnIterator(Plain):
    def __init__(self):
        super().__init__()
        self.stream = {"numbers": iter(range(100))}

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * next(self.stream["numbers"])


class Tries(Callback):
    """Tries a re-run after each batch and remembers what stopped it."""

    def __init__(self, change=lambda batch: batch):
        self.reasons, self.change = [], change

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        try:
            with isolated(trainer, pl_module) as sandbox:
                sandbox.step(self.change(batch), batch_idx)
        except (CannotReplay, ValueError) as error:
            self.reasons.append(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        pytest.param(FailsTheSecondTime, "ValueError: this batch has been seen", id="raises"),
        pytest.param(OwnIterator, "CannotReplay: module.stream.numbers is a range_iterator", id="iterator"),
    ],
)
def test_a_module_that_cannot_be_run_again_trains_on_untouched(shape, reason, tmp_path):
    tries = Tries()
    _, tried, trace = train(shape, tmp_path / "a", tries)
    _, untried, other = train(shape, tmp_path / "b")
    assert len(tries.reasons) == 10
    assert all(r.startswith(reason) for r in tries.reasons)
    first, second = ({k: v for k, v in vars(m).items() if k != "stream"} for m in (tried, untried))
    assert remains(first) == remains(second)
    assert remains(trace.losses) == remains(other.losses)
    if shape is OwnIterator:
        assert next(tried.stream["numbers"]) == next(untried.stream["numbers"]) == 10


def test_a_batch_that_is_used_up_by_reading_is_refused(tmp_path):
    tries = Tries(change=iter)
    train(Plain, tmp_path, tries)
    assert all("batch is a list_iterator" in reason for reason in tries.reasons)
    assert len(tries.reasons) == 10


def test_a_batch_that_the_step_changes_in_place_is_put_back(tmp_path):
    class Halves(Plain):
        def training_step(self, batch, batch_idx):
            batch[0].div_(2)
            batch.append("seen")
            return super().training_step(batch[:2], batch_idx)

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = batch[0].clone()
            with isolated(trainer, pl_module) as sandbox:
                first = loss_of(sandbox.step(batch, batch_idx))
                second = loss_of(sandbox.step(batch, batch_idx))
                assert torch.equal(first, second)
            assert torch.equal(batch[0], before)
            assert len(batch) == 2

    train(Halves, tmp_path, Looks())
