"""A compiled training is run again as it was compiled.

To the bit, and without compiling anew what the training has compiled.
"""

import pytest
import torch
from lab.replay.test_reproduce import Probe, is_exact
from lightning.pytorch import seed_everything
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from training_tasks import Digits, train

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs, **options):
        self.graphs += 1
        return aot_eager(graph, inputs, **options)


class Logs(Digits):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Silent(Digits):
    """Dynamo cannot trace `self.log` of this Lightning."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


def whole(backend):
    return torch.compile(Silent(), backend=backend)


def part(backend):
    module = Logs()
    module.net[0] = torch.compile(module.net[0], backend=backend)
    module.net[5].compile(backend=backend)
    return module


def configured(backend):
    class Configured(Logs):
        def configure_model(self):
            if not isinstance(self.net, torch._dynamo.OptimizedModule):
                self.net = torch.compile(self.net, backend=backend)

    return Configured()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(make, probes, tmp_path):
    backend = Counting()
    seed_everything(0, verbose=False)
    module = make(backend)
    trainer = train(module, probes, tmp_path, max_epochs=2)
    return backend.graphs, trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [whole, part, configured])
def test_it_comes_out_to_the_bit_and_the_compiled_code_is_used_again(make, tmp_path):
    suite = CounterfactualReplay()
    probe = Probe(suite)
    graphs, trainer = trained(make, [suite, probe], tmp_path)
    is_exact(probe)
    torch._dynamo.reset()
    plain, other = trained(make, [], tmp_path)
    assert graphs == plain > 0
    for a, b in zip(trainer.lightning_module.parameters(), other.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert trainer.callback_metrics.keys() == other.callback_metrics.keys()
    for name, value in other.callback_metrics.items():
        assert torch.equal(trainer.callback_metrics[name], value)
