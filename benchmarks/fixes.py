"""Does the first fix heal?

Every run of the diagnosis benchmark that did harm is trained again with the first fix of its report applied.

    python benchmarks/diagnosis.py --runs runs/ ...            (first: the runs whose reports are to be followed)
    python benchmarks/fixes.py --runs runs/ [--seed 0] [--seeds 3] [--task TASK ...] [--cause CAUSE ...] [--jobs 2]
    [--out fixes.json]

A fix that is a setting with a value (a rate, a warm-up, a norm to clip at, an epsilon, a decay, a step to stop at, a
limit of sample weights) is applied with that value while the fault goes on as before. Samples that are to be dropped or
mended come out of the fault as they went in, those that are named and no others. What tells the user to mend something
of theirs (a line of code, an operation, a device) is
applied by leaving the fault out, but only where it names what was put in. The trouble is gone if the loss does no harm
any more, as the benchmark judges it: by comparison with the clean twin, a resumed run from its resume on; a run with a
restart by comparison with one whose restart goes no higher than the module's own rate. Printed are the shares by cause,
and what did not help.
"""

import argparse
import dataclasses
import functools
import json
import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from diagnosis import LABELLED
from labelled_runs.judging import harmed
from labelled_runs.runs import Cell, all_cells, faults_of, recorded, recorded_store, train
from labelled_runs.tasks import TASKS, loaders
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shared.intervals import wilson
from torch import Tensor
from typing_extensions import override

from lightning_spike.callbacks.grad_norm_monitor import GradNormMonitor
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.records import Change
from lightning_spike.signals.batch import BatchLeaf, BatchPart, batch_leaves
from lightning_spike.store import TrainerStateStore
from lightning_spike.testing import Fault, WarmRestarts
from lightning_spike.testing.batch_edit import edit_batch, number_of_samples, replaced
from lightning_spike.testing.wrapping import wrap

MENDS: Final[Mapping[str, frozenset[str]]] = {
    "hard_sample_streak": frozenset({"shuffle"}),
    "data_drift": frozenset({"normalisation", "input_limit"}),
    "lr_scheduler_fault": frozenset({"schedule"}),
    "resume_fault": frozenset({"code:resume", "optimizer_state", "schedule"}),
    "optimizer_state_corruption": frozenset({"optimizer_state", "code:optimizer_state"}),
    "numerical_instability": frozenset({"operation"}),
    "bad_initialization": frozenset({"initialization"}),
    "activation_saturation": frozenset({"activation", "normalization_layer"}),
    "gradient_vanishing": frozenset({"activation", "normalization_layer", "initialization"}),
    "hardware_fault": frozenset({"hardware"}),
    "distributed_desync": frozenset({"code:all_reduce", "code:weights"}),
    "loss_scaling": frozenset({"loss_scale", "precision"}),
    "GradientsTurnRound": frozenset({"code:gradient"}),
    "GradientsNotZeroed": frozenset({"code:zero_grad"}),
    "EvalModeLeftOn": frozenset({"code:train_mode"}),
    "ParametersNotOptimized": frozenset({"code:parameters"}),
    "WeightsOverwritten": frozenset({"code:weights"}),
}
"""What must be mended for a fault to be gone, by its cause or class."""


# -- applying
# ------------------------------------------------------------------------------------------------------------


class SettingsHeld(Callback):
    """Sets the named setting of every parameter group to what the fix says, before every update."""

    def __init__(self, setting: Callable[[dict[str, Any], int], None]) -> None:
        self.setting = setting

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(functools.partial(self._before, trainer))

    def _before(self, trainer: Trainer, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        for group in optimizer.param_groups:
            self.setting(group, trainer.global_step)


class RateScaled(Callback):
    """The rate of each update is changed for that update alone, so that schedules go on undisturbed."""

    def __init__(self, rate: Callable[[float, int], float]) -> None:
        self.rate = rate
        self._own: list[float] = []
        self._used: list[float] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(functools.partial(self._before, trainer))
            optimizer.register_step_post_hook(self._after)

    def _before(self, trainer: Trainer, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        self._own = [group["lr"] for group in optimizer.param_groups]
        self._used = [self.rate(own, trainer.global_step) for own in self._own]
        for group, used in zip(optimizer.param_groups, self._used, strict=True):
            group["lr"] = used

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        for group, own, used in zip(optimizer.param_groups, self._own, self._used, strict=True):
            if group["lr"] == used:  # the fault may have put back the planned rate already
                group["lr"] = own


class WeightsLimited(Callback):
    """Sample weights are cut off."""

    def __init__(self, most: float) -> None:
        self.most = most

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrap(pl_module, "training_step", lambda call, batch, *more: call(edit_batch(batch, self._cut), *more))

    def _cut(self, leaf: BatchLeaf) -> Tensor:
        value: Tensor = leaf.value
        return value.clamp(max=self.most) if leaf.part is BatchPart.WEIGHT else value


class Mended(Callback):
    """The fault goes on, but the named samples come out of it as they went in; with sample weights and targets."""

    def __init__(self, fault: Fault, positions: Mapping[int, Sequence[int]]) -> None:
        self.fault, self.positions = fault, positions

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        own = self.fault.before_batch

        def before_batch(trainer: Trainer, module: LightningModule, batch: object, ordinal: int) -> object:
            spoilt = own(trainer, module, batch, ordinal)
            return with_samples_of(spoilt, batch, self.positions.get(ordinal, ()))

        vars(self.fault)["before_batch"] = before_batch


def with_samples_of(batch: Any, other: Any, positions: Sequence[int]) -> Any:
    """A batch with the samples at these positions taken from another one of the same structure."""
    if not positions:
        return batch
    size, mended = number_of_samples(batch), {leaf.path: leaf.value for leaf in batch_leaves(other)}

    def mend(leaf: BatchLeaf) -> Tensor:
        value: Tensor = leaf.value
        if value.dim() == 0 or value.shape[0] != size:
            return value
        return value.index_copy(0, torch.tensor(positions), mended[leaf.path][list(positions)])

    return replaced(batch, {leaf.path: mend(leaf) for leaf in batch_leaves(batch)})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """How a fix is applied."""

    fault_goes_on: bool = True
    callbacks: tuple[Callback, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int | None = None


def treatment(change: Change, cell: Cell, faults: Sequence[Fault], onset: int) -> Treatment | None:
    """What the fix amounts to in this run; `None` where it misses the fault or cannot be applied."""
    setting, value = change.setting, change.value
    whole = f"{setting}:{value}" if setting == "code" else setting
    if any(whole in MENDS.get(name, ()) for name in (*cell.causes, cell.name)):
        return Treatment(fault_goes_on=False)
    if setting == "drop_samples":
        named = _named(cell, faults, onset, value)
        return Treatment(callbacks=tuple(Mended(fault, named) for fault in faults)) if named else None
    apply = APPLIED.get("lr" if setting.startswith("lr-") else setting)
    return apply(float(value)) if apply is not None and isinstance(value, float | int) else None


def _at_most(value: float) -> Treatment:
    return Treatment(callbacks=(RateScaled(lambda rate, _: min(rate, value)),))


def _warmed_up(updates: float) -> Treatment:
    return Treatment(callbacks=(RateScaled(lambda rate, step: rate * min((step + 1) / updates, 1.0)),))


def _held(setting: Callable[[float, dict[str, Any], int], None], value: float) -> Treatment:
    return Treatment(callbacks=(SettingsHeld(functools.partial(setting, value)),))


def _momentum(value: float, group: dict[str, Any], step: int) -> None:
    del step
    if "betas" in group:
        group["betas"] = (value, group["betas"][1])
    else:
        group["momentum"] = value


def _beta2(value: float, group: dict[str, Any], step: int) -> None:
    del step
    group["betas"] = (group["betas"][0], value)


def _eps(value: float, group: dict[str, Any], step: int) -> None:
    del step
    group["eps"] = value


def _weight_decay(value: float, group: dict[str, Any], step: int) -> None:
    del step
    group["weight_decay"] = value


APPLIED: Final[Mapping[str, Callable[[float], Treatment]]] = {
    "lr": _at_most,
    "schedule": _at_most,
    "warmup_steps": _warmed_up,
    "gradient_clip_val": lambda value: Treatment(options={"gradient_clip_val": value}),
    "momentum": functools.partial(_held, _momentum),
    "betas": functools.partial(_held, _beta2),
    "eps": functools.partial(_held, _eps),
    "weight_decay": functools.partial(_held, _weight_decay),
    "sample_weight_limit": lambda value: Treatment(callbacks=(WeightsLimited(value),)),
    "max_steps": lambda value: Treatment(steps=int(value)),
}
"""Settings that are applied with their value, the fault going on as before."""


def _named(cell: Cell, faults: Sequence[Fault], onset: int, value: object) -> dict[int, list[int]]:
    """By struck batch the positions of the samples that a fix names; all of that of the onset where it names none."""
    struck = [o for o in range(cell.steps) if any(fault.lasts(o) for fault in faults)]
    if not struck:
        return {}
    order = _order(cell, max(struck) + 1)
    if not isinstance(value, tuple):
        return {onset: list(range(len(order[onset])))} if onset in struck else {}
    wanted = set(value)
    named = {o: [k for k, index in enumerate(order[o]) if index in wanted] for o in struck}
    return {o: positions for o, positions in named.items() if positions}


def _order(cell: Cell, count: int) -> list[list[int]]:
    """Dataset indices of the batches of a run."""
    loader, _ = loaders(cell.task, cell.seed)
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < count:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += list(loader.batch_sampler or [])
        epoch += 1
    return batches[:count]


# -- one run
# -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One report, and what came of following it."""

    cell: Cell
    named: str
    change: Change | None
    fix: str
    applied: bool
    healed: bool


def follow(cell: Cell, folder: Path) -> Followed | None:
    """Train again with the first fix; `None` where there was no harm."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = recorded(folder, cell)
    twin = recorded(folder, Cell(task=cell.task, seed=cell.seed, sort="clean", name="clean"))
    if found is None or twin is None or found.store is None or twin.store is None:
        return None
    healthy = _like(cell, twin.store)
    if not harmed(cell, found.store, healthy):
        return None
    overall = diagnose(found.store).overall
    if not overall:
        return Followed(cell=cell, named="-", change=None, fix="-", applied=False, healed=False)
    first = overall[0]
    episode = next((e for e in found.store.episodes if e.id in first.episodes), None)
    faults = faults_of(cell)
    onset = cell.at if episode is None else episode.onset.ordinal
    way = None if first.change is None else treatment(first.change, cell, faults, onset)
    healed = False if way is None else _is_healed(cell, faults, way, healthy)
    return Followed(
        cell=cell, named=first.cause, change=first.change, fix=next(iter(first.fixes), "-"), applied=way is not None,
        healed=healed,
    )  # fmt: skip


def _losses_only(scratch: Path) -> list[Callback]:
    """Enough to tell whether there is harm: the suite changes nothing about a run."""
    del scratch
    return [GradNormMonitor()]


def _like(cell: Cell, twin: TrainerStateStore) -> TrainerStateStore:
    """The run that a cell is held against.

    Its clean twin; for a restart one that restarts at the module's own rate, for the schedule's low rates before have
    their price too.
    """
    faults = faults_of(cell)
    if not any(isinstance(fault, WarmRestarts) for fault in faults):
        return twin
    rate = TASKS[cell.task].optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
    return _trained(cell, [*faults, RateScaled(lambda planned, _: min(planned, rate))], faults, cell.steps)


def _is_healed(cell: Cell, faults: Sequence[Fault], way: Treatment, twin: TrainerStateStore) -> bool:
    steps = cell.steps if way.steps is None else max(way.steps, cell.at + 1)
    callbacks = [*(faults if way.fault_goes_on else ()), *way.callbacks]
    return not harmed(cell, _trained(cell, callbacks, faults, steps, way.options), twin, steps=steps)


def _trained(
    cell: Cell,
    callbacks: Sequence[Callback],
    needs: Sequence[Fault],
    steps: int,
    options: Mapping[str, Any] | None = None,
) -> TrainerStateStore:
    """Train a run anew; of the suite only what is needed to keep its losses."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "store"
        train(cell, callbacks, raw, Path(scratch), steps=steps, needs=needs, options=options or {}, watch=_losses_only)
        return recorded_store(raw)


def main(argv: Sequence[str] | None = None) -> None:
    """As said at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--cause", nargs="+", metavar="CAUSE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(argv)
    cells = all_cells(range(chosen.seed, chosen.seed + chosen.seeds), chosen.task, chosen.cause)
    cells = [cell for cell in cells if cell.sort in LABELLED]
    with ProcessPoolExecutor(chosen.jobs) as pool:
        answers = pool.map(follow, cells, [chosen.runs] * len(cells))
        followed = [f for f in track(answers, "training again", total=len(cells)) if f is not None]
    _print(followed)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps([dataclasses.asdict(f) for f in followed], indent=1) + "\n")


def _print(followed: Sequence[Followed]) -> None:
    table = Table("cause", "did harm", "trouble gone", "", title="with the first fix applied by hand")
    groups: dict[str, list[Followed]] = defaultdict(list)
    for one in followed:
        groups[one.cell.causes[0]].append(one)
    for cause, of in [*sorted(groups.items()), ("all", list(followed))]:
        gone = sum(f.healed for f in of)
        low, high = wilson(gone, len(of))
        table.add_row(cause, str(len(of)), f"{gone}/{len(of)}", f"{gone / max(len(of), 1):.2f} ({low:.2f}-{high:.2f})")
    Console(width=140).print(table)
    for one in followed:
        if not one.healed:
            how = "applied" if one.applied else "not what was put in"
            print(f"{one.cell.key}: named {one.named}, {how}: {one.change} {one.fix[:120]}")


if __name__ == "__main__":
    main()
