"""A step under manual optimisation, looked at without its updates."""

import pytest
import torch
from lab.attached import attached
from lab.shapes import Plain
from lightning.pytorch import seed_everything
from sandbox.test_isolation import remains
from torch import nn
from torch.nn import functional
from training_tasks import TwoByHand, digits

from lightning_spike.sandbox.isolation import isolated, loss_of


class Pair(TwoByHand):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(digits(32), batch_size=8)


class Toggles(Plain):
    """Two nets with an optimizer each, a closure, and a schedule stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        with self.toggled_optimizer(first):
            loss = functional.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])
            self.manual_backward(loss)
            self.clip_gradients(first, gradient_clip_val=0.1)
            first.step()
        second.step(lambda: self.manual_backward(functional.cross_entropy(self.other(batch[0]), batch[1])))
        self.lr_schedulers().step()
        return {"loss": loss.detach()} if batch_idx == 1 else None

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.other)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)]


def fitted(make):
    seed_everything(0, verbose=False)
    module = make()
    trainer = attached(module)
    return trainer, module, next(iter(module.train_dataloader()))


def test_the_losses_are_those_of_the_backward_passes_with_their_graphs():
    trainer, module, batch = fitted(Pair)
    x, y = batch
    code = module.encoder(x)
    own = [
        functional.mse_loss(module.decoder(code), x.flatten(1)),
        functional.cross_entropy(module.head(code.detach()), y),
    ]
    expected = torch.autograd.grad(sum(own), list(module.parameters()))
    with isolated(trainer, module) as sandbox:
        outputs = sandbox.step(batch, 0)
        assert [outputs[f"loss/backward{k}"].item() for k in range(2)] == [loss.item() for loss in own]
        loss_of(outputs).backward()
        for parameter, gradient in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_toggles_closures_and_schedules_leave_nothing_behind():
    trainer, module, batch = fitted(Toggles)
    before = remains([module, trainer.optimizers, trainer.lr_scheduler_configs[0].scheduler.state_dict()])
    with isolated(trainer, module) as sandbox:
        outputs = sandbox.step(batch, 0)
        inside = remains([list(module.parameters()), trainer.lr_scheduler_configs[0].scheduler.state_dict()])
        loss_of(outputs).backward()
        assert all(p.grad is not None for p in module.parameters()), "whatever was toggled"
        sandbox.rewind()
        assert inside == remains([list(module.parameters()), trainer.lr_scheduler_configs[0].scheduler.state_dict()])
    assert remains([module, trainer.optimizers, trainer.lr_scheduler_configs[0].scheduler.state_dict()]) == before
    assert all("step" not in vars(o) for o in trainer.strategy._lightning_optimizers)


def test_a_loss_that_is_returned_is_the_loss():
    trainer, module, batch = fitted(Toggles)
    with isolated(trainer, module) as sandbox:
        assert set(sandbox.step(batch, 1)) == {"loss"}


@pytest.mark.parametrize("make", [Pair, Toggles])
def test_afterwards_the_step_trains_as_ever(make):
    ends = []
    for look in (True, False):
        trainer, module, batch = fitted(make)
        if look:
            with isolated(trainer, module) as sandbox:
                sandbox.step(batch, 0)
        trainer.fit_loop.epoch_loop.manual_optimization.run({"batch": batch, "batch_idx": 0})
        ends.append([*module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
