"""Real small trainings with one fault each and their clean twins: what the whole suite says was the cause.

    python benchmarks/first_causes.py [--seeds 1] [--seed 0] [--only FAULT ...] [--task TASK ...] [--show] [--out first_causes.json]

Prints a table fault x task (first cause, its probability, whether the replay confirmed it, a tick where it is the one that was put in) and the
episodes of the clean twins. `--show` prints the whole report of every run. A fault that did no harm to the loss (no episode) is told
apart from one that was misread. Some minutes on one core; data are scikit-learn's digits and the standard library's source.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from tasks import ByteGRU, ByteTransformer, cnn, mlp
from tasks import dataset as data_of
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_spike import RootCauseReport, TrainerStateStore, suite
from lightning_spike.records import RunStatus
from lightning_spike.report.model import Report, build_report
from lightning_spike.report.terminal import TerminalReport

STEPS: Final = 400
AT: Final = 230
"""The batch that a fault strikes."""
UNEXPLAINED: Final = "unexplained"


# -- tasks ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, and at which rate it trains well."""

    make: Callable[[], nn.Module]
    bytes: bool
    batch: int
    optimizer: str
    rate: float


TASKS: Final[Mapping[str, Task]] = {
    "mlp sgd 32": Task(make=mlp, bytes=False, batch=32, optimizer="SGD", rate=0.05),
    "cnn adamw 16": Task(make=cnn, bytes=False, batch=16, optimizer="AdamW", rate=2e-3),
    "cnn sgd 8": Task(make=cnn, bytes=False, batch=8, optimizer="SGD", rate=0.01),
    "gru adamw 16": Task(make=ByteGRU, bytes=True, batch=16, optimizer="AdamW", rate=4e-3),
    "gru sgd 32": Task(make=ByteGRU, bytes=True, batch=32, optimizer="SGD", rate=0.5),
    "transformer adamw 32": Task(make=ByteTransformer, bytes=True, batch=32, optimizer="AdamW", rate=2e-3),
}


# -- faults --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong, and what should be said about it."""

    expected: str | None
    """The cause that should be first; `None`: none of the catalogue is right, so none should be likely."""
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Makes the inputs and targets of the batch `AT`, from healthy ones."""
    rate: Callable[[int], float] | None = None
    """Factor on the learning rate by step."""
    jump: tuple[int, int, float] | None = None
    """From and up to which step a callback multiplies the rate, and by what."""
    restarts: float | None = None
    """Peak of cosine warm restarts, as a factor on the rate."""
    gradient: float | None = None
    """Factor on the gradients of the step before `AT`."""
    loss: str | None = None
    """What the module does in its loss from `AT` on."""
    samples: int | None = None
    """Training samples, if few."""
    for_bytes: bool = True
    for_floats: bool = True
    sgd_only: bool = False


def _random_bytes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randint_like(x, 128), torch.randint_like(y, 128)


def _one_nan(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[0, 0, 0] = torch.nan
    return x, y


FAULTS: Final[Mapping[str, Fault]] = {
    "clean": Fault(expected=None),
    "values out of range": Fault(expected="bad_batch", spoil=lambda x, y: (20.0 - 20.0 * x, y), for_bytes=False),
    "random bytes": Fault(expected="bad_batch", spoil=_random_bytes, for_floats=False),
    "wrong labels": Fault(expected="bad_batch", spoil=lambda x, y: (x, y.roll(1, 0)), for_bytes=False),
    "one NaN": Fault(expected="nonfinite_input", spoil=_one_nan, for_bytes=False),
    "restarts": Fault(expected="lr_restart", restarts=30.0),
    "rate x100": Fault(expected="lr_scheduler_fault", jump=(AT, AT + 6, 100.0)),
    "rate x20 for good": Fault(expected="lr_scheduler_fault", jump=(AT, 10**9, 20.0)),
    "rate climbs": Fault(expected="lr_too_high", rate=lambda step: 200.0 ** (max(step - 60, 0) / (STEPS - 60))),
    "short warm-up": Fault(expected="warmup_too_short", rate=lambda step: 20.0 * min((step + 1) / 30, 1.0)),
    "gradient x1000": Fault(expected="gradient_explosion", gradient=1000.0, sgd_only=True),
    "log(0)": Fault(expected="numerical_instability", loss="log"),
    "0/0": Fault(expected="numerical_instability", loss="div"),
    "loss x1000": Fault(expected=None, loss="scale"),
    "few samples": Fault(expected="overfitting", samples=80, for_bytes=False),
}


class Faulty(LightningModule):
    """A module as a user would write it, with the fault in it."""

    def __init__(self, task: Task, fault: Fault) -> None:
        super().__init__()
        self.task, self.fault, self.net = task, fault, task.make()

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, written unsafely or scaled where the fault says so."""
        del batch_idx
        x, y = batch
        logits: Tensor = self.net(x)
        struck = self.global_step == AT
        if self.fault.loss == "log" and self.global_step >= AT:
            chosen = torch.softmax(40.0 * logits, dim=1).gather(1, y.unsqueeze(1))
            return -torch.log(chosen).mean() / 40.0
        loss = functional.cross_entropy(logits, y)
        if self.fault.loss == "div" and struck:
            spread = (logits - logits.detach()).std()
            return loss * (spread / spread)
        return 1000.0 * loss if self.fault.loss == "scale" and struck else loss

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the mean cross-entropy."""
        del batch_idx
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    @override
    def on_after_backward(self) -> None:
        """Scale the gradients where the fault says so."""
        if self.fault.gradient is not None and self.global_step == AT - 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.fault.gradient

    @override
    def configure_optimizers(self) -> Any:
        """The task's optimizer, with the fault's schedule."""
        peak = self.task.rate * (self.fault.restarts or 1.0)
        make = torch.optim.AdamW if self.task.optimizer == "AdamW" else torch.optim.SGD
        more: dict[str, Any] = (
            {} if self.task.optimizer == "AdamW" else {"momentum": 0.9 if not self.task.bytes else 0.0}
        )
        optimizer = make(self.parameters(), lr=peak, **more)
        if self.fault.restarts is not None:
            schedule: Any = _restarts(optimizer, self.fault.restarts)
        elif self.fault.rate is not None:
            schedule = lr_scheduler.LambdaLR(optimizer, self.fault.rate)
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _restarts(optimizer: torch.optim.Optimizer, factor: float) -> lr_scheduler.LRScheduler:
    """Cosine warm restarts that begin late in their first cycle, so that the first peak that is used is the one at step `AT`."""
    low = optimizer.param_groups[0]["lr"] / factor / 50
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=8 * AT, eta_min=low)
    schedule.step(7 * AT)
    return schedule


class MovesTheRate(Callback):
    """A user's callback that writes into the parameter groups."""

    def __init__(self, jump: tuple[int, int, float]) -> None:
        self.first, self.last, self.factor = jump

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Multiply, and divide again."""
        del args
        group = trainer.optimizers[0].param_groups[0]
        if trainer.global_step == self.first:
            group["lr"] *= self.factor
        elif trainer.global_step == self.last:
            group["lr"] /= self.factor


class Batches:
    """A batch sampler that is the same on every pass, with the spoilt samples (the last of the dataset) at batch `AT`."""

    def __init__(self, count: int, spoilt: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._batches: list[list[int]] = []
        while len(self._batches) < STEPS:
            order = torch.randperm(count, generator=generator).tolist()
            self._batches += [order[k : k + size] for k in range(0, count - size + 1, size)]
        del self._batches[STEPS:]
        if spoilt:
            self._batches[AT] = list(range(count, count + spoilt))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


# -- one run -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was said about one run."""

    fault: str
    task: str
    seed: int
    expected: str | None
    episodes: list[str]
    first: str | None
    probability: float
    confirmed: bool | None
    unconfirmed_why: list[str]
    right: bool | None
    """`None` where the fault did no harm that shows, so that there was nothing to judge."""
    seconds: float


def run(name: str, task_name: str, seed: int, *, show: bool) -> Outcome:
    """Train once under the whole suite and judge the first cause over the run."""
    report, store = _train(name, task_name, seed)
    if show:
        Console(width=120).print(TerminalReport(report=report))
    first = report.causes[0] if report.causes else None
    expected = FAULTS[name].expected
    likely = first.cause if first is not None and first.probability > 0.2 else UNEXPLAINED  # noqa: PLR2004 - a cause in earnest
    return Outcome(
        fault=name,
        task=task_name,
        seed=seed,
        expected=expected,
        episodes=[f"{e.kind.value} {e.onset.step}-{'' if e.end is None else e.end.step}" for e in report.episodes],
        first=first.cause if first is not None else None,
        probability=first.probability if first is not None else 0.0,
        confirmed=first.confirmed if first is not None else None,
        unconfirmed_why=[str(f.detail.get("why")) for f in store.findings if f.kind == "not_run"],
        right=None if expected is not None and not report.episodes else likely == (expected or UNEXPLAINED),
        seconds=report.seconds,
    )


def _train(name: str, task_name: str, seed: int) -> tuple[Report, TrainerStateStore]:
    task, fault = TASKS[task_name], FAULTS[name]
    seed_everything(seed, verbose=False)
    inputs, targets = data_of("bytes" if task.bytes else "digits", seed).tensors
    held = 256
    x, y = inputs[held:], targets[held:]
    epochs = 1
    if fault.samples is not None:
        x, y, epochs = x[: fault.samples], y[: fault.samples], STEPS * task.batch // fault.samples
    spoilt = 0
    if fault.spoil is not None:
        bad = fault.spoil(x[: task.batch].clone(), y[: task.batch].clone())
        x, y, spoilt = torch.cat([x, bad[0]]), torch.cat([y, bad[1]]), task.batch
    dataset = TensorDataset(x, y)
    if fault.samples is not None:
        loader = DataLoader(dataset, batch_size=task.batch, shuffle=True)
    else:
        loader = DataLoader(dataset, batch_sampler=Batches(len(x) - spoilt, spoilt, task.batch, seed))
    own = [MovesTheRate(fault.jump)] if fault.jump is not None else []
    module = Faulty(task, fault)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            num_sanity_val_steps=0,
            val_check_interval=1.0 if fault.samples is not None else STEPS // 4,
            callbacks=[*own, *suite(RootCauseReport(formats=["json"], dirpath=folder), dirpath=folder)],
        )
        trainer.fit(module, loader, DataLoader(TensorDataset(inputs[:held], targets[:held]), batch_size=held))
        store = TrainerStateStore.of(trainer)
        seconds = json.loads((Path(folder) / "report.json").read_text())["run"]["seconds"]
    return build_report(store, status=RunStatus.FINISHED, seconds=seconds), store


# -- the whole -----------------------------------------------------------------------------------------------------------


def _fits(fault: Fault, task: Task) -> bool:
    kind = fault.for_bytes if task.bytes else fault.for_floats
    return kind and (task.optimizer == "SGD" or not fault.sgd_only)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("fault", *TASKS, title="first cause over the run (probability, ! = confirmed by replay)")
    for fault in FAULTS:
        row = [[o for o in outcomes if o.fault == fault and o.task == task] for task in TASKS]
        if any(row):
            table.add_row(fault, *("\n".join(map(_cell, cell)) for cell in row))
    return table


def _cell(o: Outcome) -> str:
    if not o.episodes:
        return "[green]✓[/] no episode" if o.right else "– no episode"
    mark = "[green]✓[/] " if o.right else "[red]✗[/] "
    sure = {True: " !", False: " (refuted)", None: ""}[o.confirmed]
    return f"{mark}{o.first or UNEXPLAINED} {o.probability:.2f}{sure}"


def main(argv: Sequence[str] | None = None) -> None:
    """As said at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    outcomes = []
    for fault in chosen.only:
        for task in chosen.task:
            if _fits(FAULTS[fault], TASKS[task]):
                for seed in range(chosen.seed, chosen.seed + chosen.seeds):
                    o = run(fault, task, seed, show=chosen.show)
                    outcomes.append(o)
                    mark = {True: "right", False: "WRONG", None: "-"}[o.right]
                    said = f"{o.first} {o.probability:.2f} {o.confirmed} {o.episodes} {o.unconfirmed_why}"
                    print(f"{mark:6}{fault:18} {task:20} seed {seed}: {said}", flush=True)
    Console().print(_table(outcomes))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1) + "\n")


if __name__ == "__main__":
    main()
