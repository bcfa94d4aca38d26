"""Activation statistics against a hook of the test's own; dead and saturated units and modes from real faults."""

import numpy as np
import pytest
import torch
from callbacks.watching import found, store_of, watched
from lightning.pytorch import Callback
from torch import nn
from training_tasks import TASKS, Digits, DigitsTransformer, build, train

from lightning_spike import ActivationMonitor, BadBatchDumper
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing import EvalModeLeftOn, UnitsSaturate


class Reference(Callback):
    """What one module put out in each training batch."""

    def __init__(self, name):
        self.name, self.outs = name, []

    def on_train_start(self, trainer, pl_module):
        part = pl_module.get_submodule(self.name)
        part.register_forward_hook(lambda m, a, out: self.outs.append(out.detach().clone()))


def test_sizes_and_zeros(tmp_path):
    reference = Reference("net.2")
    store = watched("cnn", [reference, ActivationMonitor(every=5)], tmp_path, max_epochs=1)
    outs = reference.outs[::5]
    place = store.layer_names["activation_max"].index("net.2")
    column = lambda signal, k: [row.values[k] for row in store.layers[signal]]  # noqa: E731
    np.testing.assert_allclose(column("activation_max", place), [float(o.max()) for o in outs], rtol=1e-6)
    np.testing.assert_allclose(
        column("activation_rms", place), [float(o.square().mean().sqrt()) for o in outs], rtol=1e-5
    )
    np.testing.assert_allclose(column("activation_zeros", 0), [float((o == 0).float().mean()) for o in outs], rtol=1e-5)
    assert store.layer_names["activation_dead"] == ("net.2",)
    assert [row.at.ordinal for row in store.layers["activation_max"]] == list(range(0, 32, 5))


def test_nothing_of_it_remains_between_the_sampled_batches(tmp_path):
    class Counts(Callback):
        def __init__(self):
            self.counts = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.counts.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

        def on_before_backward(self, trainer, pl_module, loss):
            self.counts.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    counts = Counts()
    watched("cnn", [ActivationMonitor(every=4), counts], tmp_path, max_steps=5)
    assert counts.counts == [6, 0, 0, 0, 0, 0, 0, 0, 6, 0]


@pytest.mark.parametrize("task", ["cnn", "transformer"])
def test_units_that_die(task, tmp_path):
    store = watched(task, [UnitsSaturate.strong(at=10), ActivationMonitor(every=5)], tmp_path, max_epochs=1)
    dead = {row.at.ordinal: row.values.max() for row in store.layers["activation_dead"]}
    assert max(dead[0], dead[5]) < 0.5
    assert min(dead[10], dead[15]) > 0.9


def test_units_that_saturate(tmp_path):
    store = watched("two_by_hand", [ActivationMonitor(every=5), UnitsSaturate.strong(at=10)], tmp_path, max_epochs=1)
    saturated = {row.at.ordinal: float(row.values[0]) for row in store.layers["activation_saturated"]}
    assert saturated[5] < 0.1
    assert saturated[10] > 0.7


@pytest.mark.parametrize("variant", ["mild", "strong"])
def test_eval_mode_left_on(variant, tmp_path):
    fault = getattr(EvalModeLeftOn, variant)(at=12)
    store = watched("cnn", [fault, ActivationMonitor()], tmp_path, max_epochs=1)
    (finding,) = store.findings
    assert (finding.detector, finding.kind, finding.at.ordinal) == ("modes", "eval_mode", 12)
    if variant == "strong":
        assert finding.detail["matters"] == ["net.1", "net.4"]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")
def test_a_module_that_is_in_eval_mode_from_the_start_or_frozen_later_is_no_finding(tmp_path):
    class Freezes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                pl_module.net[1].eval().requires_grad_(False)

    module = Digits()
    module.net[4].eval()
    assert store_of(module, [Freezes(), ActivationMonitor()], tmp_path, max_epochs=1).findings == []


@pytest.mark.parametrize("task", TASKS)
def test_validations_in_between_are_no_finding(task, tmp_path):
    store = watched(task, [ActivationMonitor()], tmp_path, max_epochs=2, validate=task != "two_by_hand")
    assert found(store, "modes") == []


@pytest.mark.parametrize("how", ["part", "in place", "whole"])
def test_compiled_modules_are_passed_over_and_the_report_says_so(how, tmp_path):
    class Quiet(Digits):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    module = Quiet()
    if how == "part":
        module.net = torch.compile(module.net, backend="eager")
    elif how == "in place":
        module.net.compile(backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    store = store_of(module, [ActivationMonitor(every=1)], tmp_path, max_steps=3)
    assert any("torch.compile" in remark for remark in store.remarks)
    assert not any(name.startswith("net") for name in store.layer_names["activation_max"])


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")
def test_a_frozen_encoder_in_eval_mode_keeps_its_fast_path(tmp_path):
    class Frozen(DigitsTransformer):
        def __init__(self):
            super().__init__()
            self.embed.requires_grad_(False)
            self.encoder.eval().requires_grad_(False)

    modules = []
    for callbacks in ([], [ActivationMonitor(every=1)]):
        torch.manual_seed(0)
        modules.append(Frozen())
        train(modules[-1], callbacks, tmp_path, max_steps=10)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))


def test_a_module_that_runs_twice_counts_with_its_largest_and_one_that_does_not_run_with_minus_one(tmp_path):
    class Twice(Digits):
        def __init__(self):
            super().__init__()
            self.head, self.idle = nn.Linear(10, 10), nn.Linear(2, 2)

        def forward(self, x):
            out = self.head(self.net(x))
            return self.head(out * 100)

    reference = Reference("head")
    store = store_of(Twice(), [reference, ActivationMonitor(every=1)], tmp_path, max_steps=2)
    names, row = store.layer_names["activation_max"], store.layers["activation_max"][0]
    assert row.values[names.index("head")] == pytest.approx(max(float(o.abs().max()) for o in reference.outs[:2]))
    assert row.values[names.index("idle")] == -1.0


@pytest.mark.parametrize("bad", [0, 1.5, "2", True])
def test_a_bad_argument_is_refused_at_construction(bad):
    with pytest.raises(ConfigurationError, match="every"):
        ActivationMonitor(every=bad)


@pytest.mark.parametrize("fault", [UnitsSaturate.strong(at=40), None], ids=["saturate", "healthy"])
def test_units_that_go_flat_are_found_and_healthy_ones_are_not(fault, tmp_path):
    callbacks = [ActivationMonitor(every=5), *([fault] if fault is not None else [])]
    store = watched("cnn", callbacks, tmp_path, max_epochs=4)
    found = [(f.kind, f.at.ordinal) for f in store.findings if f.detector == "activations"]
    assert found == ([("flat", 45)] if fault is not None else [])


def test_the_batch_after_an_episode_was_noticed_is_measured_too(tmp_path):
    module, options = build("cnn")
    module.burst = 45
    store = store_of(
        module,
        [ActivationMonitor(every=1000), BadBatchDumper(dirpath=tmp_path / "dump")],
        tmp_path,
        max_epochs=4,
        **options,
    )
    noticed = [e.noticed.ordinal for e in store.episodes]
    assert noticed
    assert [row.at.ordinal for row in store.layers["activation_rms"]] == [0, *(n + 1 for n in noticed)]
