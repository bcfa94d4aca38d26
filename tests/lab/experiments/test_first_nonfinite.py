import pytest
import torch
from lab.attached import attached
from lab.shapes import CLASSES, FEATURES, Plain
from torch import nn
from torch.nn import functional

from lightning_spike.lab.experiments.first_nonfinite import first_nonfinite
from lightning_spike.sandbox.isolation import isolated


class Log(nn.Module):
    def forward(self, x):
        return x.relu().log()


class Sqrt(nn.Module):
    def forward(self, x):
        return (x * 0).sqrt()


class LogInside(Plain):
    def make(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), Log(), nn.Linear(8, CLASSES))


class SqrtInside(Plain):
    """The root of zero is zero, its slope there is not finite."""

    def make(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), Sqrt(), nn.Linear(8, CLASSES))


class LogInLoss(Plain):
    def training_step(self, batch, batch_idx):
        p = self.net(batch[0]).softmax(1) * 0
        return -p.log()[:, 0].mean()


class LossModule(Plain):
    def __init__(self):
        super().__init__()
        self.criterion = nn.PoissonNLLLoss()

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]).abs() * 1e4 + 1e4, torch.zeros(len(batch[0]), CLASSES))


class MaskedRow(Plain):
    """Attention over nothing: the infinities are written on purpose, the softmax makes NaN of them."""

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0]).masked_fill(torch.ones(len(batch[0]), CLASSES, dtype=torch.bool), -torch.inf)
        attention = scores.softmax(1)
        return functional.cross_entropy(self.net(batch[0]) + attention, batch[1])


class Overflow(Plain):
    """An infinity of its own comes to be before NaN does."""

    def training_step(self, batch, batch_idx):
        big = (self.net(batch[0]).abs() * 1e4 + 1e4).exp()
        harmless = torch.where(torch.ones(()) > 0, 0.0, torch.zeros(()).log())
        return (big - big).mean() + harmless


def origin_of(shape, batch=None):
    torch.manual_seed(2)
    module = shape()
    trainer = attached(module)
    batch = batch or [torch.randn(8, FEATURES), torch.randint(CLASSES, (8,))]
    with isolated(trainer, module) as sandbox:
        found = first_nonfinite(sandbox, batch, 0)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return found


@pytest.mark.parametrize(
    ("shape", "phase", "module", "operation"),
    [
        pytest.param(LogInside, "forward", "net.1", "log", id="forward"),
        pytest.param(SqrtInside, "backward", "net.1", "SqrtBackward0", id="backward"),
        pytest.param(LogInLoss, "loss", "", "log", id="loss"),
        pytest.param(LossModule, "loss", "criterion", "exp", id="loss-module"),
        pytest.param(MaskedRow, "forward", "", "_softmax", id="masked"),
        pytest.param(Overflow, "loss", "", "exp", id="overflow"),
    ],
)
def test_the_operation_is_named(shape, phase, module, operation):
    found = origin_of(shape)
    assert (found.phase, found.module, found.operation) == (phase, module, operation)


def test_a_bad_value_in_the_batch_is_named_by_its_leaf():
    x = torch.randn(8, FEATURES)
    x[2, 3] = torch.inf
    found = origin_of(Plain, [x, torch.randint(CLASSES, (8,))])
    assert (found.phase, found.module, found.operation) == ("input", None, "batch[0]")
    assert found.count == 1


def test_nothing_is_said_of_a_batch_that_passes():
    assert origin_of(Plain) is None


def test_nothing_is_said_where_the_weights_are_gone_already():
    class Gone(Plain):
        def on_fit_start(self):
            self.net[0].weight.data[0, 0] = torch.nan

    assert origin_of(Gone) is None
