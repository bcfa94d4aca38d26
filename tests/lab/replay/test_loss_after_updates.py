"""The losses after some updates, against the same steps by plain torch."""

import copy

import pytest
import torch
from lab.attached import attached
from lab.made import entry, moment, settings
from lab.shapes import CLASSES, FEATURES, Plain

from lightning_spike.lab.replay.loss_after_updates import at_rate, loss_after_updates
from lightning_spike.lab.replay.update import Update
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

RATES = (0.1, 0.4)


class WithSGD(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [
        entry(k, [torch.randn(8, FEATURES, generator=generator), torch.randint(CLASSES, (8,), generator=generator)])
        for k in range(count)
    ]


def by_hand(module, entries, rates, evaluated):
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters())
    for one, rate in zip(entries, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plain.training_step(one.batch, 0).backward()
        optimizer.step()
    return [float(plain.training_step(one.batch, 0).detach()) for one in evaluated]


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_they_are_those_of_the_steps_by_hand(factor):
    torch.manual_seed(0)
    module = WithSGD()
    trainer = attached(module)
    *made, held = batches(3)
    expected = by_hand(module, made, [rate * factor for rate in RATES], [held, made[0]])
    before = copy.deepcopy(module.state_dict())
    with isolated(trainer, module, with_optimizers=True) as sandbox:
        updates = [Update(entries=(e,), settings=(settings(r),)) for e, r in zip(made, RATES, strict=True)]
        start = TrainState.take(sandbox, moment(0))
        found = loss_after_updates(sandbox, start, [at_rate(u, factor) for u in updates], [held, made[0]], like=held)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_gradient_that_is_not_finite_has_no_outcome():
    module = WithSGD()
    (bad,) = batches(1)
    bad.batch[0][0, 0] = float("nan")
    with isolated(attached(module), module, with_optimizers=True) as sandbox:
        start = TrainState.take(sandbox, moment(0))
        update = Update(entries=(bad,), settings=(settings(0.1),))
        assert loss_after_updates(sandbox, start, [update], [bad], like=bad) is None
