import numpy as np
import pytest
import torch
from lab.attached import attached
from lab.shapes import CLASSES, FEATURES, Plain
from torch import nn
from torch.nn import functional

from lightning_spike.samples.per_sample import is_loss_function, samples_under
from lightning_spike.sandbox.isolation import isolated

SIZE = 12


def losses_of(module, batch):
    trainer = attached(module)
    before = [p.clone() for p in (*module.parameters(), *module.buffers())]
    with isolated(trainer, module) as sandbox:
        found = samples_under(sandbox, None, batch, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, (*module.parameters(), *module.buffers()), strict=True))
    return found


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(5)


def a_batch():
    return [torch.randn(SIZE, FEATURES), torch.randint(CLASSES, (SIZE,))]


def test_the_tap_gives_what_the_loss_function_gives_unreduced():
    module, (x, y) = Plain(), a_batch()
    found = losses_of(module, [x, y])
    expected = functional.cross_entropy(module.net(x), y, reduction="none").detach().numpy()
    assert (found.how, found.explains) == ("tap", True)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    assert found.batch_loss == pytest.approx(expected.mean(), rel=1e-6)


def test_the_tap_sees_loss_modules_in_eval_mode():
    class Regression(Plain):
        def make(self):
            return nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.5), nn.Linear(16, 2))

        def training_step(self, batch, batch_idx):
            return nn.SmoothL1Loss()(self.net(batch["x"]), batch["y"])

    module, batch = Regression(), {"x": torch.randn(SIZE, FEATURES), "y": torch.randn(SIZE, 2)}
    found = losses_of(module, batch)
    module.eval()
    expected = functional.smooth_l1_loss(module.net(batch["x"]), batch["y"], reduction="none").mean(1).detach().numpy()
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)


def test_losses_by_token_are_averaged_over_what_counts_of_each_sample():
    class Tokens(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return functional.cross_entropy(self.net(x).view(-1, CLASSES), y.view(-1), ignore_index=-1)

    module, x = Tokens(), torch.randn(SIZE, 7, FEATURES)
    y = torch.randint(CLASSES, (SIZE, 7))
    y[torch.rand(SIZE, 7) < 0.4] = -1
    y[0, 0] = 0
    y[3] = -1
    found = losses_of(module, (x, y))
    logits = module.net(x).detach()
    for sample in range(SIZE):
        kept = y[sample] >= 0
        expected = functional.cross_entropy(logits[sample][kept], y[sample][kept]).item() if kept.any() else 0.0
        assert found.losses[sample] == pytest.approx(expected, rel=1e-5)
    assert (found.how, found.explains) == ("tap", True)


class ByHand(Plain):
    """A loss without a function of torch's, behind batch norm."""

    def make(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return -self.net(x).log_softmax(1).gather(1, y[:, None]).mean()


def test_slices_find_the_same_where_the_loss_is_written_by_hand():
    module, (x, y) = ByHand(), a_batch()
    found = losses_of(module, [x, y])
    module.eval()
    expected = functional.cross_entropy(module.net(x), y, reduction="none").detach().numpy()
    assert (found.how, found.explains) == ("slices", True)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)


def test_one_bad_sample_is_named_though_batch_norm_spreads_it_over_the_batch():
    class WithNorm(ByHand):
        training_step = Plain.training_step

    x, y = a_batch()
    x[4, 2] = torch.nan
    found = losses_of(WithNorm(), [x, y])
    assert np.flatnonzero(~np.isfinite(found.losses)).tolist() == [4]


def test_a_loss_with_a_penalty_beside_it_is_cut_into_slices():
    class Penalty(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 5 * sum((p**2).sum() for p in self.net.parameters())

    module, batch = Penalty(), a_batch()
    found = losses_of(module, batch)
    assert (found.how, found.explains) == ("slices", True)
    assert found.losses.mean() == pytest.approx(module.training_step(batch, 0).item(), rel=1e-5)


def test_two_losses_that_add_up_are_added_up():
    class Two(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.net(x)
            return functional.cross_entropy(logits, y) + functional.mse_loss(logits, torch.zeros_like(logits))

    module, (x, y) = Two(), a_batch()
    logits = module.net(x).detach()
    expected = functional.cross_entropy(logits, y, reduction="none") + (logits**2).mean(1)
    np.testing.assert_allclose(losses_of(module, [x, y]).losses, expected.numpy(), rtol=1e-5)


def test_a_loss_that_compares_samples_with_each_other_has_no_losses_by_sample():
    class Contrast(Plain):
        def training_step(self, batch, batch_idx):
            z = functional.normalize(self.net(batch[0]), dim=1)
            return -(z @ z.T).log_softmax(1).diagonal().mean()

    assert losses_of(Contrast(), a_batch()) is None


def test_a_step_that_fails_when_run_again_gives_none():
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            raise ValueError

    assert losses_of(Fails(), a_batch()) is None


@pytest.mark.parametrize(
    "function", [functional.cross_entropy, functional.mse_loss, functional.huber_loss, functional.ctc_loss]
)
def test_losses_of_torch_are_known(function):
    assert is_loss_function(function)


@pytest.mark.parametrize("function", [functional.relu, functional.linear, torch.add, torch.Tensor.mean])
def test_what_is_no_loss_is_not_taken_for_one(function):
    assert not is_loss_function(function)
