"""Two ranks that fall apart."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from testing.runs import Items, Net, collate
from torch.utils.data import DataLoader

from lightning_spike.testing import GradientsNotAveraged, RankDrifts


class SumOfWeights(Callback):
    """Written down by each rank after every batch."""

    def __init__(self, folder):
        self.folder, self.sums = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sums.append(sum(float(p.detach().double().sum()) for p in pl_module.parameters()))
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.sums))


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("fault", "apart_at"),
    [(RankDrifts(2, 0.5), 2), (GradientsNotAveraged(2, 1.0, length=1), 2)],
    ids=["drifts", "not averaged"],
)
def test_ranks_are_together_before_and_apart_after(tmp_path, fault, apart_at):
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    items = Items("tuple", 40)
    trainer = Trainer(
        max_steps=4, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[SumOfWeights(tmp_path), fault],
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(items, 4, collate_fn=collate(items)))
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one[:apart_at] == pytest.approx(two[:apart_at], rel=1e-9)
    assert all(abs(a - b) > 1e-3 for a, b in zip(one[apart_at:], two[apart_at:], strict=True))
