"""One update against those before it, computed a second time with numpy from the gradients alone."""

import numpy as np
import pytest
import torch
from lab.attached import attached
from lab.measure.entries import entry, moment
from lab.shapes import CLASSES, FEATURES, Plain
from torch.nn import functional

from lightning_spike.diagnosis.judgement import update_direction
from lightning_spike.lab.measure.updates import measure_update
from lightning_spike.lab.replay.reproduce import ReplayedUpdate, Reproduction
from lightning_spike.lab.replay.update import Update, UpdateOutcome
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

RATE, BETA1, BETA2, EPS = 0.01, 0.9, 0.999, 1e-8
UPDATES = 7
RECENT = 4
"""Updates just before, of which the usual is taken."""


class ByAdam(Plain):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=RATE, betas=(BETA1, BETA2), eps=EPS)


class BySgd(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)


def legs_of(sandbox, *, last_rate=RATE, flip=False, turned=0):
    """Updates made here and not by the lab.

    The last one with another rate, or with its momentum turned round; the last `turned` with their gradients turned
    round.
    """
    module, optimizer = sandbox.module, sandbox.trainer.optimizers[0]
    x, y = torch.randn(16, FEATURES), torch.arange(16) % CLASSES
    updates_replayed = []
    for k in range(UPDATES):
        batch = [x + 0.05 * torch.randn_like(x), y]
        if k == UPDATES - 1:
            optimizer.param_groups[0]["lr"] = last_rate
            for state in optimizer.state.values():
                if flip:
                    state["momentum_buffer"].mul_(-40)
        before = TrainState.take(sandbox, moment(k))
        optimizer.zero_grad()
        loss = functional.cross_entropy(module.net(batch[0]), batch[1])
        loss.backward()
        if k >= UPDATES - turned:
            for parameter in module.parameters():
                parameter.grad.mul_(-3.0)
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        made = UpdateOutcome(losses=(loss.item(),), gradients=gradients, spoilt_at=None)
        updates_replayed.append(
            ReplayedUpdate(before=before, update=Update(entries=(entry(batch, k),), settings=()), made=made)
        )
        optimizer.step()
    return updates_replayed, TrainState.take(sandbox, moment(UPDATES))


def measured(kind, passes=1, **how):
    torch.manual_seed(1)
    module = kind()
    trainer = attached(module)
    with isolated(trainer, module, with_optimizers=True) as sandbox:
        updates_replayed, end = legs_of(sandbox, **how)
        again = Reproduction(
            updates_replayed=tuple(updates_replayed),
            end=end,
            reached=UPDATES,
            steps=UPDATES,
            differs_at=None,
            replayed=1.0,
        )
        steps = sandbox.steps
        found = measure_update(sandbox, again, UPDATES - 1)
        assert sandbox.steps - steps == passes
    return found, updates_replayed, end, module


def test_second_moments_momentum_and_length_as_numpy_has_them():
    found, updates_replayed, end, _ = measured(ByAdam, last_rate=30 * RATE)
    gradients = [{name: g.double().numpy() for name, g in leg.made.gradients.items()} for leg in updates_replayed]

    def rms(k, name):
        second = (1 - BETA2) * sum(BETA2 ** (k - 1 - j) * gradients[j][name] ** 2 for j in range(k)) / (1 - BETA2**k)
        return np.sqrt(np.mean(gradients[k][name] ** 2 / np.maximum(second, EPS**2)))

    def cosine(k):
        momentum = {n: sum(BETA1 ** (k - 1 - j) * gradients[j][n] for j in range(k)) for n in gradients[0]}
        m = np.concatenate([momentum[n].ravel() for n in momentum])
        g = np.concatenate([gradients[k][n].ravel() for n in momentum])
        return m @ g / np.linalg.norm(m) / np.linalg.norm(g)

    last = UPDATES - 1
    largest = max(gradients[0], key=lambda name: rms(last, name))
    assert found.tensor == largest
    assert found.rms == pytest.approx(rms(last, largest), rel=1e-4)
    assert found.rms_usual == pytest.approx(np.median([rms(k, largest) for k in range(last - RECENT, last)]), rel=1e-4)
    assert found.cosine == pytest.approx(cosine(last), rel=1e-4)
    assert found.cosine_usual == pytest.approx(np.median([cosine(k) for k in range(last - RECENT, last)]), rel=1e-4)
    states = [*(leg.before.weights for leg in updates_replayed), end.weights]
    flat = [np.concatenate([w[n].double().numpy().ravel() for n in gradients[0]]) for w in states]
    lengths = [np.linalg.norm(flat[k + 1] - flat[k]) for k in range(UPDATES)]
    assert found.length == pytest.approx(lengths[-1], rel=1e-5)
    assert found.length_usual == pytest.approx(np.median(lengths[-1 - RECENT : -1]), rel=1e-5)
    assert found.relative_length == pytest.approx(lengths[-1] / np.linalg.norm(flat[-2]), rel=1e-5)


def test_rho_is_the_change_over_what_the_gradient_promised():
    found, updates_replayed, end, module = measured(BySgd)
    x, y = updates_replayed[-1].update.entries[0].batch
    after = torch.func.functional_call(module.net, {n.removeprefix("net."): w for n, w in end.weights.items()}, (x,))
    change = functional.cross_entropy(after, y).item() - updates_replayed[-1].made.losses[0]
    promise = sum(
        ((end.weights[n] - updates_replayed[-1].before.weights[n]) * g).sum().item()
        for n, g in updates_replayed[-1].made.gradients.items()
    )
    assert found.rho == pytest.approx(change / promise, rel=1e-3)
    assert update_direction(found) == "ordinary"
    assert found.rms is None


def test_a_step_that_is_too_long_and_one_in_a_wrong_direction():
    assert update_direction(measured(BySgd, 2, last_rate=3000 * RATE)[0]) == "too_long"
    assert update_direction(measured(BySgd, flip=True)[0]) == "wrong_direction"


@pytest.mark.parametrize("module", [BySgd, ByAdam])
@pytest.mark.parametrize("stretch", [1, 2, 4])
def test_a_gradient_that_points_up_its_own_loss_is_told_from_a_step_that_is_too_long(module, stretch):
    found = measured(module, 3, turned=stretch)[0]
    assert update_direction(found) == "turned"
    assert found.slope == pytest.approx(-1 / 3, rel=0.05)
    assert found.slope_usual == pytest.approx(1.0, rel=0.05)


def test_where_all_replayed_gradients_do_the_earliest_has_such_a_slope_too():
    found = measured(BySgd, 3, turned=UPDATES)[0]
    assert update_direction(found) == "turned_throughout"
    assert found.slope_usual == pytest.approx(-1 / 3, rel=0.05)


def test_the_slope_of_a_step_that_is_far_too_long_is_that_of_its_loss():
    assert measured(BySgd, 2, last_rate=3000 * RATE)[0].slope == pytest.approx(1.0, rel=0.05)
