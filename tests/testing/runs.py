"""Tiny trainings that faults are put into, and everything about every batch written down by a callback that knows
nothing of faults."""

import copy
import dataclasses
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_spike.testing import Needs

FEATURES, CLASSES, TOKENS, TIME = 6, 3, 11, 5
AT = 6
"""The batch that faults begin at."""
BATCHES = 12
"""Of one epoch, and of a run."""


class Items(Dataset):
    """Tuples of floats, nested dicts with things that are no tensors, or tokens with the tokens that follow."""

    def __init__(self, shape, count=4 * BATCHES):
        self.shape = shape
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(count, FEATURES, generator=generator)
        self.y = torch.randint(CLASSES, (count,), generator=generator)
        self.tokens = torch.randint(TOKENS, (count, TIME + 1), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return k


def collate(items):
    def together(indices):
        index = torch.tensor(indices)
        x, y, tokens = items.x[index], items.y[index], items.tokens[index]
        if items.shape == "tokens":
            return tokens[:, :-1], tokens[:, 1:]
        if items.shape == "nested":
            views = {"image": x, "mask": x > 0, "note": None}
            return {
                "views": [views, "left"],
                "label": y,
                "weight": torch.ones(len(y)),
                "ids": [str(k) for k in indices],
            }
        return x, y

    return together


class Net(LightningModule):
    """Classifier or next-token model with dropout, so that a random number drawn by somebody else shows."""

    def __init__(self, shape="tuple", optimizer="sgd"):
        super().__init__()
        self.optimizer = optimizer
        self.seen_in_validation = []
        if shape == "tokens":
            self.embed, self.body = nn.Embedding(TOKENS, 4), nn.GRU(4, 8, batch_first=True)
            self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, TOKENS)
        else:
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)
            )

    def loss(self, batch):
        if isinstance(batch, dict):
            each = functional.cross_entropy(self.net(batch["views"][0]["image"]), batch["label"], reduction="none")
            return (each * batch["weight"]).mean()
        x, y = batch
        if x.is_floating_point():
            return functional.cross_entropy(self.net(x), y)
        return functional.cross_entropy(self.head(self.drop(self.body(self.embed(x))[0])).flatten(0, 1), y.flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.seen_in_validation.append(copy.deepcopy(batch))

    def configure_optimizers(self):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclasses.dataclass
class Row:
    """One batch: what was there before it, and what came of it."""

    batch: object = None
    weights: object = None
    state: object = None
    modes: object = None
    settings: object = None
    grads: object = None
    loss: object = None


class Records(Callback):
    """A `Row` for each batch, by Lightning's hooks alone."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        row = Row(batch=held(batch), weights=held(dict(pl_module.named_parameters())))
        row.state = [held([dict(s) for s in optimizer.state.values()]) for optimizer in trainer.optimizers]
        row.modes = [part.training for part in pl_module.modules()]
        self.rows.append(row)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rows[-1].grads = held([p.grad for p in pl_module.parameters()])
        self.rows[-1].settings = [
            {**{k: v for k, v in group.items() if k != "params"}, "count": len(group["params"])}
            for group in optimizer.param_groups
        ]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows[-1].loss = held(outputs["loss"])


def held(tree):
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def same(a, b):
    """Equal to the bit, NaN included, whatever the structure."""
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def different(a, b):
    """The fields in which two rows differ."""
    return {f.name for f in dataclasses.fields(Row) if not same(getattr(a, f.name), getattr(b, f.name))}


def shape_for(kind):
    if Needs.INTEGER_INPUT in kind.NEEDS:
        return "tokens"
    return "nested" if Needs.WEIGHT in kind.NEEDS else "tuple"


def optimizer_for(kind):
    return "adamw" if Needs.ADAM in kind.NEEDS else "sgd"


@dataclasses.dataclass
class Run:
    rows: list
    module: Net
    trainer: Trainer
    items: Items
    random: Tensor


def train(*faults, shape="tuple", optimizer="sgd", fault_first=True, scaler=False, ckpt_path=None, **options):
    """One run of `BATCHES` batches on one thread; the seed is always the same."""
    torch.set_num_threads(1)
    seed_everything(1, verbose=False)
    module, items, records = Net(shape, optimizer), Items(shape), Records()
    callbacks = [*faults, records] if fault_first else [records, *faults]
    if scaler:
        scale = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scale)]
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        **(defaults | options),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    loader = DataLoader(items, 4, shuffle=True, collate_fn=collate(items), generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*barebones|.*lr_scheduler.step\\(\\)")
        trainer.fit(module, loader, DataLoader(items, 8, collate_fn=collate(items)), ckpt_path=ckpt_path)
    return Run(rows=records.rows, module=module, trainer=trainer, items=items, random=torch.get_rng_state())
