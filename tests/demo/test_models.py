"""Both networks are real: they learn their task, and the Transformer does not look ahead."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.optim import SGD, AdamW

from lightning_spike.demo.byte_transformer import ByteTransformer
from lightning_spike.demo.digits import DigitsData
from lightning_spike.demo.digits_cnn import DigitsCNN
from lightning_spike.demo.source_code import SourceCodeData


@pytest.fixture
def trainer(tmp_path):
    def build(**options):
        seed_everything(1, verbose=False)
        return Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )

    return build


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"optimizer": "adamw", "lr": 0.003, "dropout": 0.1}])
def test_the_cnn_reads_digits(trainer, options):
    fit = trainer(max_epochs=4)
    fit.fit(DigitsCNN(**options), DigitsData())
    assert fit.callback_metrics["val_accuracy"] > 0.9


def test_the_transformer_beats_a_table_of_byte_frequencies(trainer):
    fit, data = trainer(max_epochs=1), SourceCodeData(train_files=40, val_files=4)
    fit.fit(ByteTransformer(dim=32, lr=0.005), data)
    following = torch.stack([data.val_set[i][1] for i in range(len(data.val_set))]).flatten()
    share = torch.bincount(following, minlength=256).double() / len(following)
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert fit.callback_metrics["val_loss"] < entropy


def test_the_transformer_sees_only_what_came_before():
    model = ByteTransformer(context=16).eval()
    window = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = window.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(window), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_a_window_shorter_than_the_context_is_fine():
    assert ByteTransformer(context=16)(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 256)


def test_restarts_bring_the_learning_rate_back_up(trainer):
    fit, model = trainer(max_steps=12, limit_val_batches=0), DigitsCNN(lr=0.1, restart_every=5, restart_lr_min=0.01)
    used = []

    def record(optimizer):
        used.append(optimizer.param_groups[0]["lr"])

    model.on_before_optimizer_step = record
    fit.fit(model, DigitsData())
    cycle = [0.01 + 0.09 * (1 + torch.cos(torch.tensor(torch.pi * k / 5)).item()) / 2 for k in range(5)]
    assert used == pytest.approx([*cycle, *cycle, *cycle[:2]], rel=1e-5)


def test_without_restarts_there_is_no_schedule():
    assert isinstance(DigitsCNN(optimizer="sgd").configure_optimizers(), SGD)
    assert isinstance(DigitsCNN(optimizer="adamw").configure_optimizers(), AdamW)
