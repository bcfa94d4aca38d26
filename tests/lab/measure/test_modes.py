import pytest
import torch
from lab.attached import attached
from lab.measure.entries import entry
from lab.shapes import CLASSES, FEATURES, NormAndDropout, Plain
from torch import nn
from torch.nn import functional

from lightning_spike.diagnosis.judgement import mode_gap_change
from lightning_spike.lab.measure.measure import measure_modes
from lightning_spike.record.state_copy import copy_module
from lightning_spike.sandbox.isolation import isolated


class Normed(Plain):
    def make(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def measured(module, spoil=lambda _name, tensor: tensor, prepare=lambda _module: None):
    torch.manual_seed(3)
    batch = [torch.randn(16, FEATURES), torch.arange(16) % CLASSES]
    trainer, old = attached(module), copy_module(module)
    prepare(module)
    new = {name: spoil(name, tensor.clone()) for name, tensor in old.items()}
    modes = [part.training for part in module.modules()]
    with isolated(trainer, module) as sandbox:
        found = measure_modes(sandbox, entry(batch), old=old, new=new)
        passes = sandbox.steps
    assert [part.training for part in module.modules()] == modes
    return found, passes, batch, new


def test_running_statistics_that_do_not_fit_show_in_eval_mode_alone():
    module = Normed()
    found, passes, (x, y), new = measured(module, lambda n, t: t - 30 if n.endswith("running_mean") else t)
    assert passes == 4
    module.load_state_dict(new)
    assert found.eval == pytest.approx(functional.cross_entropy(module.eval().net(x), y).item(), rel=1e-5)
    assert found.train == pytest.approx(functional.cross_entropy(module.train().net(x), y).item(), rel=1e-5)
    assert found.usual_train == pytest.approx(found.train, rel=1e-5)
    assert mode_gap_change(found) > 2


def test_as_ever():
    found, _, _, _ = measured(NormAndDropout())
    assert 0.5 < mode_gap_change(found) < 2
    assert found.frozen == ()


def test_where_modes_make_no_difference_nothing_more_is_asked():
    found, passes, _, _ = measured(Plain())
    assert passes == 2
    assert found.train == found.eval
    assert found.usual_eval is None


def test_modules_in_eval_mode_are_named():
    assert measured(NormAndDropout(), prepare=lambda m: m.net[1].eval())[0].frozen == ("net.1",)
    found, _, _, _ = measured(NormAndDropout(), prepare=lambda m: m.eval())
    assert found.frozen == ("",)
