"""Sizes of weights and updates against clones that the test takes itself; and scales at the start."""

import numpy as np
import pytest
import torch
from callbacks.watching import found, recorded, store_of, watched
from lightning.pytorch import Callback
from torch import nn
from training_tasks import TASKS, Digits

from lightning_spike import WeightMonitor
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing import InitialWeightsScaled


class Reference(Callback):
    """The norm of all weights after every batch, and of their change in it."""

    def __init__(self):
        self.norms, self.moves, self.last = [], [], None

    def weights(self, module):
        return torch.cat([p.detach().double().flatten() for p in module.parameters()])

    def on_train_start(self, trainer, pl_module):
        self.last = self.weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = self.weights(pl_module)
        self.norms.append(float(now.norm()))
        self.moves.append(float((now - self.last).norm()))
        self.last = now


@pytest.mark.parametrize("task", ["cnn", "transformer"])
def test_sizes_of_weights_and_updates(task, tmp_path):
    reference = Reference()
    store = watched(task, [WeightMonitor(every=4), reference], tmp_path, max_epochs=1)
    np.testing.assert_allclose(recorded(store, "weight_norm"), reference.norms[::4], rtol=1e-5)
    np.testing.assert_allclose(recorded(store, "update_norm"), reference.moves[::4], rtol=1e-3)
    rows = store.layers["update_norm"]
    np.testing.assert_allclose([np.linalg.norm(r.values) for r in rows], reference.moves[::4], rtol=1e-3)
    assert store.layer_names["weight_norm"] == store.layer_names["update_norm"]


def test_under_accumulation_updates_are_counted(tmp_path):
    reference = Reference()
    store = watched("accumulation", [reference, WeightMonitor(every=2)], tmp_path, max_epochs=1)
    moves = [move for move in reference.moves if move > 0]
    np.testing.assert_allclose(recorded(store, "update_norm"), moves[::2], rtol=1e-3)


def test_with_two_optimizers_every_parameter_has_its_own_update(tmp_path):
    reference = Reference()
    store = watched("two_by_hand", [WeightMonitor(every=1), reference], tmp_path, max_epochs=1)
    np.testing.assert_allclose(recorded(store, "update_norm"), reference.moves, rtol=1e-3)
    assert all((row.values >= 0).all() for row in store.layers["update_norm"])


def test_a_frozen_parameter_does_not_move(tmp_path):
    module = Digits()
    module.net[0].weight.requires_grad_(False)
    store = store_of(module, [WeightMonitor(every=5)], tmp_path, max_epochs=1)
    place = store.layer_names["update_norm"].index("net.0.weight")
    assert all(row.values[place] == 0.0 for row in store.layers["update_norm"])


@pytest.mark.parametrize("task", TASKS)
def test_torchs_initialisation_is_no_finding(task, tmp_path):
    assert watched(task, [WeightMonitor()], tmp_path, max_steps=2).findings == []


@pytest.mark.parametrize(("factor", "direction"), [(8.0, "large"), (50.0, "large"), (0.01, "small")])
def test_scaled_weights_are_found(factor, direction, tmp_path):
    store = watched("cnn", [InitialWeightsScaled(0, factor), WeightMonitor()], tmp_path, max_steps=2)
    (finding,) = store.findings
    assert (finding.detector, finding.kind, finding.detail["direction"]) == ("weights", "initial_scale", direction)
    assert finding.detail["names"] == ["net.0.weight", "net.5.weight"]
    assert finding.detail["scale"] == pytest.approx(0.577 * factor, rel=0.2)


def test_one_layer_with_a_standard_deviation_of_one_is_found_and_one_of_zeros_is_not(tmp_path):
    module = Digits()
    nn.init.normal_(module.net[5].weight)
    store = store_of(module, [WeightMonitor()], tmp_path, max_steps=2)
    assert [f.detail["names"] for f in store.findings] == [["net.5.weight"]]
    module = Digits()
    nn.init.zeros_(module.net[5].weight)
    assert found(store_of(module, [WeightMonitor()], tmp_path, max_steps=2), "weights") == []


@pytest.mark.parametrize("bad", [0, 1.5, "2", True])
def test_a_bad_argument_is_refused_at_construction(bad):
    with pytest.raises(ConfigurationError, match="every"):
        WeightMonitor(every=bad)
