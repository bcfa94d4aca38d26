"""The recorded norms against norms read independently, by a callback of the test's own, with torch's own function."""

import numpy as np
import pytest
import torch
from callbacks.watching import watched
from lightning.pytorch import Callback
from training_tasks import Digits, TwoByHand, build, train

from lightning_spike.callbacks.grad_norm_monitor import GradNormMonitor
from lightning_spike.errors import ConfigurationError
from lightning_spike.store import TrainerStateStore
from lightning_spike.testing import GradientsVanish


class Reference(Callback):
    """Total norms before clipping, and after it, step by step."""

    def __init__(self):
        self.before, self.after = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.before.append(float(torch.nn.utils.get_total_norm(grads)))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.after.append(float(torch.nn.utils.get_total_norm(grads)))


def recorded(trainer, signal):
    history = TrainerStateStore.of(trainer).history
    return history.series(signal)[history.present(signal)]


def test_every_step_is_recorded_before_clipping(tmp_path):
    module, options = build("cnn")
    reference = Reference()
    trainer = train(module, [reference, GradNormMonitor()], tmp_path, **options, gradient_clip_val=0.1)
    np.testing.assert_allclose(recorded(trainer, "grad_norm"), reference.before, rtol=1e-6)
    assert max(reference.before) > 0.1
    np.testing.assert_allclose(recorded(trainer, "grad_norm/after_clip"), np.minimum(reference.before, 0.1), rtol=1e-6)


def test_clipping_by_value_is_measured(tmp_path):
    module, options = build("cnn")
    reference = Reference()
    trainer = train(
        module,
        [GradNormMonitor(), reference],
        tmp_path,
        **options,
        gradient_clip_val=0.01,
        gradient_clip_algorithm="value",
    )
    after = recorded(trainer, "grad_norm/after_clip")
    np.testing.assert_allclose(after[:-1], reference.after, rtol=1e-5)
    assert np.all(after < recorded(trainer, "grad_norm"))


def test_accumulation_gives_one_norm_an_update_at_the_windows_end(tmp_path):
    module, _ = build("cnn")
    reference = Reference()
    trainer = train(module, [GradNormMonitor(), reference], tmp_path, accumulate_grad_batches=4, max_epochs=1)
    history = TrainerStateStore.of(trainer).history
    np.testing.assert_allclose(recorded(trainer, "grad_norm"), reference.before, rtol=1e-6)
    assert [m.batch_idx for m, there in zip(history.moments(), history.present("grad_norm"), strict=True) if there][
        :3
    ] == [3, 7, 11]


def test_two_optimizers_have_a_norm_each_and_one_together(tmp_path):
    module, _ = build("two_by_hand")
    reference = Reference()
    trainer = train(module, [GradNormMonitor(), reference], tmp_path, max_epochs=1)
    first, second = np.array(reference.before).reshape(-1, 2).T
    np.testing.assert_allclose(recorded(trainer, "grad_norm/Adam"), first, rtol=1e-6)
    np.testing.assert_allclose(recorded(trainer, "grad_norm/SGD"), second, rtol=1e-6)
    np.testing.assert_allclose(recorded(trainer, "grad_norm"), np.hypot(first, second), rtol=1e-6)


def test_layers_are_named_and_a_frozen_one_has_no_gradient(tmp_path):
    module = Digits()
    module.net[0].weight.requires_grad_(False)
    trainer = train(module, [GradNormMonitor()], tmp_path, max_epochs=1)
    store = TrainerStateStore.of(trainer)
    names = store.layer_names["grad_norm"]
    assert names == tuple(name for name, _ in module.named_parameters())
    last = store.layers["grad_norm"][-1].values
    assert last[names.index("net.0.weight")] == -1
    assert last[names.index("net.5.weight")] > 0


def test_layers_only_every_so_often(tmp_path):
    trainer = train(Digits(), [GradNormMonitor(per_layer_every=10)], tmp_path, max_epochs=1)
    store = TrainerStateStore.of(trainer)
    assert [r.at.step for r in store.layers["grad_norm"]] == [0, 10, 20, 30]


def test_the_name_of_a_compiled_part_is_the_users_own(tmp_path):
    module = Digits()
    module.net = torch.compile(module.net, backend="eager")
    trainer = train(module, [GradNormMonitor()], tmp_path, max_steps=2)
    assert "net.0.weight" in TrainerStateStore.of(trainer).layer_names["grad_norm"]


@pytest.mark.parametrize("bad", [0, -3, 1.5, "2", True])
def test_a_bad_argument_is_refused_at_construction(bad):
    with pytest.raises(ConfigurationError, match="per_layer_every"):
        GradNormMonitor(per_layer_every=bad)


def test_raw_optimizers_stepped_by_hand_leave_no_norm(tmp_path):
    class Raw(TwoByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)[1]
            optimizer.zero_grad()
            x, y = batch
            loss = torch.nn.functional.cross_entropy(self.head(self.encoder(x)), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

    trainer = train(Raw(), [GradNormMonitor()], tmp_path, max_epochs=1)
    store = TrainerStateStore.of(trainer)
    assert "grad_norm" not in store.history.signals
    assert np.isfinite(store.history.series("loss")).all()
    assert any("no optimizer step" in remark for remark in store.remarks)


@pytest.mark.parametrize("fault", [GradientsVanish.mild(at=150), None], ids=["vanish", "healthy"])
def test_gradients_that_die_out_are_found_and_healthy_ones_are_not(fault, tmp_path):
    callbacks = [GradNormMonitor(), *([fault] if fault is not None else [])]
    store = watched("cnn", callbacks, tmp_path, max_epochs=12)
    # Weight and bias of the first layer fall by nearly the same factor: which of them is worst is a matter of the
    # processor.
    kinds = [(f.detector, f.kind, f.detail["names"][0].rpartition(".")[0]) for f in store.findings]
    assert len(store.history) > 214
    assert kinds == ([("gradients", "vanished", "net.0")] if fault is not None else [])
