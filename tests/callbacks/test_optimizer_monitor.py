"""The optimizer's state against what the test reads itself.

And the invariants: real faults are found, sound trainings are not.
"""

import numpy as np
import pytest
import torch
from callbacks.watching import found, recorded, store_of, watched
from lightning.pytorch import Callback
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from training_tasks import TASKS, Digits, DigitsTransformer, build

from lightning_spike import OptimizerMonitor, suite
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing import (
    GradientsNotZeroed,
    MomentumTooHigh,
    ParametersNotOptimized,
    StateRescaled,
    WeightsOverwritten,
)


class Reference(Callback):
    """RMS_t with the clipped gradient and the second moment from before, and the cosine of momentum, update by
    update."""

    def __init__(self):
        self.rms, self.cosines, self.shares, self.before = [], [], [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        state = [optimizer.state[p] for p in pl_module.parameters()]
        self.before = None
        if state[0]:
            known = 1 - 0.999 ** float(state[0]["step"])
            self.before = [s["exp_avg_sq"].clone() / known for s in state]
            g = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
            m = torch.cat([s["exp_avg"].flatten() for s in state])
            roots = torch.cat([v.sqrt().flatten() for v in self.before])
            self.shares.append(float((roots < 1e-7).float().mean()))
            self.cosines.append(float(F.cosine_similarity(g, m, dim=0)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.before is not None:
            ratios = [
                p.grad.square() / v.clamp_min(1e-16) for p, v in zip(pl_module.parameters(), self.before, strict=True)
            ]
            self.rms.append(max(float(r.mean().sqrt()) for r in ratios))


def test_rms_uses_the_clipped_gradient_and_the_second_moment_from_before(tmp_path):
    reference = Reference()
    store = watched(
        "transformer", [OptimizerMonitor(every=1), reference], tmp_path, max_epochs=1, gradient_clip_val=0.1
    )
    np.testing.assert_allclose(recorded(store, "update_rms"), reference.rms, rtol=1e-3)
    np.testing.assert_allclose(recorded(store, "momentum_cosine"), reference.cosines, atol=1e-4)
    rows = store.layers["update_rms"]
    np.testing.assert_allclose([row.values.max() for row in rows], reference.rms, rtol=1e-3)
    np.testing.assert_allclose(recorded(store, "eps_share"), reference.shares, atol=1e-3)


def test_only_every_so_many_updates(tmp_path):
    store = watched("transformer", [OptimizerMonitor(every=10)], tmp_path, max_epochs=1)
    assert [row.at.step for row in store.layers["update_rms"]] == [10, 20, 30]


@pytest.mark.parametrize("task", TASKS)
def test_a_sound_training_has_no_findings(task, tmp_path):
    """With the whole suite, validations in between, and the lab at hand."""
    store = watched(task, suite(dirpath=tmp_path / "spike"), tmp_path, max_epochs=3, validate=task != "two_by_hand")
    assert store.findings == []


def test_gradients_not_zeroed(tmp_path):
    store = watched("cnn", [GradientsNotZeroed.mild(at=12), OptimizerMonitor()], tmp_path)
    assert found(store, "optimizer") == [("not_zeroed", 12)]


def test_gradients_that_are_zeroed_but_kept_are_no_finding(tmp_path):
    class KeepsThem(Digits):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    store = store_of(KeepsThem(), [OptimizerMonitor()], tmp_path, max_epochs=1)
    assert store.findings == []
    assert (recorded(store, "grad_norm/leftover") == 0.0).all()


def test_accumulating_by_hand_is_no_finding(tmp_path):
    class ByItself(Digits):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            if batch_idx % 4 == 0:
                optimizer.zero_grad()

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()
            if batch_idx % 4 == 3:
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    assert store_of(ByItself(), [OptimizerMonitor()], tmp_path, max_epochs=1).findings == []


@pytest.mark.parametrize("at", [0, 12])
def test_parameters_not_optimized(at, tmp_path):
    store = watched("cnn", [OptimizerMonitor(), ParametersNotOptimized.mild(at=at)], tmp_path, max_epochs=1)
    (finding,) = store.findings
    assert (finding.kind, finding.at.ordinal, finding.detail["from_start"]) == ("not_optimized", at, at == 0)
    assert finding.detail["count"] == 2


def test_a_teacher_without_gradients_is_no_finding(tmp_path):
    class Taught(Digits):
        def __init__(self):
            super().__init__()
            self.teacher = torch.nn.Linear(3, 3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

    assert store_of(Taught(), [OptimizerMonitor()], tmp_path, max_epochs=1).findings == []


def test_a_parameter_that_gets_no_gradient(tmp_path):
    class Unused(Digits):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Linear(3, 3)

    (finding,) = store_of(Unused(), [OptimizerMonitor()], tmp_path, max_epochs=1).findings
    assert (finding.kind, finding.at.step) == ("no_gradient", 19)
    assert finding.detail["names"] == ["unused.weight", "unused.bias"]
    assert finding.detail["from_start"]


def test_updates_that_are_lost_in_rounding(tmp_path):
    class Stuck(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if n == "net.5.weight"], lr=1e-20)

    store = store_of(Stuck(), [OptimizerMonitor()], tmp_path, max_epochs=1)
    assert ("no_update", 10) in found(store, "optimizer")


def test_no_rate_no_finding(tmp_path):
    class WarmsUp(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    assert store_of(WarmsUp(), [OptimizerMonitor()], tmp_path, max_epochs=1).findings == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(WeightsOverwritten.mild(at=40), "weights"), (StateRescaled.mild(at=40), "optimizer_state")],
    ids=["weights", "state"],
)
def test_writes_outside_of_the_step(fault, kind, tmp_path):
    store = store_of(DigitsTransformer(), [fault, OptimizerMonitor()], tmp_path)
    (finding,) = store.findings
    assert (finding.detector, finding.kind, finding.at.ordinal) == ("outside_writes", kind, 39)
    assert finding.detail["count"] >= 20


def test_writes_at_a_validation_are_told_apart(tmp_path):
    class Swaps(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        parameter.copy_(parameter.clone())

    store = watched("cnn", [Swaps(), OptimizerMonitor()], tmp_path, validate=True, max_epochs=3)
    assert found(store, "outside_writes") == [("weights_at_validation", 63)]


@pytest.mark.parametrize("bad", [0, 1.5, "2", True])
def test_a_bad_argument_is_refused_at_construction(bad):
    with pytest.raises(ConfigurationError, match="every"):
        OptimizerMonitor(every=bad)


def test_a_setting_that_changes_while_training_runs_is_told_with_its_values(tmp_path):
    store = watched("transformer", [MomentumTooHigh.strong(at=20), OptimizerMonitor()], tmp_path, max_epochs=1)
    (finding,) = (f for f in store.findings if f.kind == "settings_changed")
    before = store.facts.optimizers[0].groups[0]["betas"]
    assert (finding.at.ordinal, finding.detail["name"]) == (20, "betas")
    assert (finding.detail["before"], finding.detail["after"]) == ([*before], [0.999, before[1]])


def test_what_the_lab_writes_and_steps_is_nobodys_fault(tmp_path):
    """An episode is examined with the real weights and optimizers; afterwards nothing is blamed on user code."""
    module, options = build("cnn")
    module.burst = 45
    store = store_of(module, suite(dirpath=tmp_path / "spike"), tmp_path, max_epochs=4, **options)
    assert any(found.split is not None for found in store.experiments.values())
    assert {f.detector for f in store.findings} <= {"batch", "learning_rate", "overfit"}
