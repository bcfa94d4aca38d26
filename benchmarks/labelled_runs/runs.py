"""One labelled run of the diagnosis benchmark.

A task, a fault, the whole suite; what it recorded is kept on disk, so that ranking can be done again in no time.
"""

import contextlib
import copyreg
import dataclasses
import functools
import gzip
import io
import itertools
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from typing_extensions import override

from labelled_runs.tasks import ADAPTIVE, NO_HALF, REGRESSION, TASKS, TOKENS, WEIGHTED, Module, loaders
from lightning_spike import RootCauseReport, TrainerStateStore, suite
from lightning_spike.callbacks.scene_recorder import SceneRecorder
from lightning_spike.testing import (
    DECOYS,
    FAULTS,
    UNCOVERED,
    CorruptTokens,
    ExtremeValues,
    Fault,
    LogOfZero,
    Needs,
    RateJump,
    RateTooHigh,
    WarmRestarts,
    WrongLabels,
    faults_for,
)

Strength = Literal["mild", "strong"]
STRENGTHS: Final[tuple[Strength, ...]] = ("mild", "strong")
SHIFT: Final = 24
"""Batches by which the onset is moved with the seed, so that the distance to the last snapshot differs."""
SETTLED: Final = 220
"""Updates on the same two batches until the text's net knows them by heart."""
WARMED_UP: Final[Mapping[Strength, float]] = {"mild": 8.0, "strong": 20.0}
"""Peaks of a warm-up that plain SGD bears if it takes longer; those of the fault itself are for Adam."""
CLEAN_STEPS: Final = 2000
"""Of a clean twin, so that false alarms can be counted."""
VALIDATION_INTERVAL: Final = 50
"""Batches between validations."""
LATER: Final = 60
"""Batches between the two faults of a run with two."""


BY_NAME: Final[Mapping[str, type[Fault]]] = {kind.__name__: kind for kind in (*FAULTS, *DECOYS, *UNCOVERED)}
"""Every fault of the package and of others."""


# -- what is run
# ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: its label, and how to make it."""

    task: str
    seed: int
    sort: Literal["fault", "clean", "decoy", "uncovered", "confusable", "two"]
    name: str
    """The fault's class, or the name of the scene."""
    causes: tuple[str, ...] = ()
    """What should be said: one id, two where two faults are in the run, none where nothing should."""
    strength: Strength = "strong"

    @property
    def key(self) -> str:
        """Unique among the cells; a file name."""
        return "-".join([self.task, self.sort, self.name, self.strength, str(self.seed)])

    @property
    def at(self) -> int:
        """The batch that the (first) fault strikes."""
        onset = self._fault.TYPICAL_ONSET
        return onset + (self.seed * 7) % SHIFT if onset > 0 else 0

    @property
    def _fault(self) -> type[Fault]:
        return BY_NAME.get(self.name, Fault)

    @property
    def steps(self) -> int:
        """Batches of the run."""
        if self.sort == "clean":
            return CLEAN_STEPS
        return self.at + self._fault.TYPICAL_DURATION + (LATER if self.sort == "two" else 0)


def _fits(kind: type[Fault], task: str) -> bool:
    """Whether the fault can happen in the task at all."""
    cannot = {
        Needs.FLOAT_INPUT: task in TOKENS,
        Needs.INTEGER_INPUT: task not in TOKENS,
        Needs.ADAM: task not in ADAPTIVE,
        Needs.WEIGHT: task not in WEIGHTED,
        Needs.LOSS_SCALER: task in NO_HALF,
    }
    if kind is LogOfZero and task in REGRESSION:  # on paper it leaves a cross-entropy as it is, and nothing else
        return False
    return not any(cannot.get(need, False) for need in kind.NEEDS)


def all_cells(seeds: Sequence[int], tasks: Sequence[str], causes: Sequence[str] | None = None) -> list[Cell]:
    """Every cell of the benchmark; with `causes`, those of these causes only.

    Every cause in two strengths for each seed; where a cause has several faults they take turns.
    """
    cells: list[Cell] = []
    for task, seed in itertools.product(tasks, seeds):
        for cause in sorted({kind.cause for kind in FAULTS if kind.cause is not None}) if causes is None else causes:
            cells += _of_cause(cause, task, seed)
        if causes is None:
            cells += [
                Cell(task=task, seed=seed, sort="clean", name="clean"),
                *(Cell(task=task, seed=seed, sort="decoy", name=k.__name__) for k in DECOYS if _fits(k, task)),
                *(Cell(task=task, seed=seed, sort="uncovered", name=k.__name__) for k in UNCOVERED if _fits(k, task)),
                *(
                    Cell(task=task, seed=seed, sort="confusable", name=name, causes=(cause,))
                    for name, cause in CONFUSABLE.items()
                ),
                Cell(task=task, seed=seed, sort="two", name="rate, then batch", causes=TWO),
            ]  # fmt: skip
    return cells


def _of_cause(cause: str, task: str, seed: int) -> list[Cell]:
    kinds = [kind for kind in faults_for(cause) if _fits(kind, task)]
    return [
        Cell(
            task=task,
            seed=seed,
            sort="fault",
            name=kinds[(seed + k) % len(kinds)].__name__,
            causes=(cause,),
            strength=strength,
        )
        for k, strength in enumerate(STRENGTHS)
        if kinds
    ]


TWO: Final = ("lr_scheduler_fault", "bad_batch")
"""The causes of a run with two faults."""
CONFUSABLE: Final[Mapping[str, str]] = {
    "restart that makes gradients explode": "lr_restart",
    "bad batch under a high rate": "bad_batch",
    "a stretch of wrong labels": "label_noise",
}
"""Scenes that look like something else, and what they are."""


def _bad_batch(task: str, at: int, seed: int) -> Fault:
    return CorruptTokens(at, 1.0, seed=seed) if task in TOKENS else ExtremeValues(at, 30.0, seed=seed)


def _options(cell: Cell) -> dict[str, Any]:
    """What is not as the faults have it."""
    if cell.name == "SwingsAfterOverfitting":
        return {"settle": SETTLED}
    if cell.name == "ShortWarmUp" and cell.task not in ADAPTIVE:
        return {"strength": WARMED_UP[cell.strength]}
    return {}


def faults_of(cell: Cell) -> list[Fault]:
    """The faults of a run, made anew."""
    at, seed = cell.at, cell.seed
    if cell.sort in {"fault", "decoy", "uncovered"}:
        return [getattr(BY_NAME[cell.name], cell.strength)(at=at, seed=seed, **_options(cell))]
    if cell.sort == "two":
        return [RateJump(at, 60.0, length=2), _bad_batch(cell.task, at + LATER, seed)]
    match cell.name:
        case "restart that makes gradients explode":
            return [WarmRestarts(at, 120.0)]
        case "bad batch under a high rate":
            return [RateTooHigh(0, 2.0), _bad_batch(cell.task, at, seed)]
        case "a stretch of wrong labels":
            return [WrongLabels(at, 1.0, length=15, seed=seed)]
    return []


# -- one run
# -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What is left of a run."""

    cell: Cell
    store: TrainerStateStore | None
    """`None` where the run broke."""
    error: str | None = None


class _KeepStore(Callback):
    """Writes the store when the fit is over, however it ended; on rank 0, which may be another process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            _write(self.path, TrainerStateStore.of(trainer))


def _write(path: Path, what: object) -> None:
    partial = path.with_suffix(".part")
    with gzip.open(partial, "wb", compresslevel=1) as file:
        pickle.dump(what, file)
    partial.replace(path)


def path_of(folder: Path, cell: Cell) -> Path:
    """Where a cell's run is kept; the file is there once it has been run."""
    return folder / f"{cell.key}.pkl.gz"


def recorded(folder: Path, cell: Cell) -> RecordedRun | None:
    """What was kept of a cell's run; `None` where it has not been run."""
    path = path_of(folder, cell)
    if not path.exists():
        return None
    with gzip.open(path, "rb") as file:
        found: RecordedRun = pickle.load(file)  # noqa: S301 - written by this benchmark
        return found


def run(cell: Cell, folder: Path) -> str | None:
    """Train once and keep what was recorded; returns what went wrong, if anything."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    raw = folder / f"{cell.key}.store"
    error = None
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        faults = faults_of(cell)
        try:
            train(cell, faults, raw, Path(scratch), steps=cell.steps, needs=faults)
        except BaseException as failed:  # noqa: BLE001 - a training may die of its fault: then too there is a diagnosis
            error = "".join(traceback.format_exception_only(failed)).strip()
    store = recorded_store(raw) if raw.exists() else None
    raw.unlink(missing_ok=True)
    _write(path_of(folder, cell), RecordedRun(cell=cell, store=store, error=error))
    return error


def recorded_store(raw: Path) -> TrainerStateStore:
    """The store that a run has left."""
    with gzip.open(raw, "rb") as file:
        store: TrainerStateStore = pickle.load(file)  # noqa: S301 - written by `_KeepStore`
    return store


def train(  # noqa: PLR0913 - what a run is made of
    cell: Cell,
    own: Sequence[Callback],
    raw: Path,
    scratch: Path,
    *,
    steps: int,
    needs: Sequence[Fault],
    options: Mapping[str, Any] = MappingProxyType({}),
    watch: Callable[[Path], Sequence[Callback]] | None = None,
) -> None:
    """One fit, or two where a resume belongs to the fault, under the suite; what was recorded goes to `raw`.

    Args:
        cell: The task and the seed.
        own: Callbacks beside the suite: faults, or what is done about them.
        raw: Where the store is written.
        scratch: An empty folder.
        steps: Batches to train, over a resume.
        needs: The faults whose needs the training must meet, even where they themselves are left out.
        options: Further arguments of the Trainer.
        watch: What watches the run, by its folder, where it is not the whole suite.
    """
    watched = _suite if watch is None else watch
    needed = frozenset[Needs]().union(*(fault.NEEDS for fault in needs))
    usual = {"gradient_clip_val": TASKS[cell.task].clip}
    trainer = functools.partial(_trainer, scratch=scratch, needs=needed, options=usual | dict(options))
    resume: str | None = None
    if Needs.RESUME in needed:
        first = trainer(steps=cell.at, callbacks=[*watched(scratch)])
        _fit(first, cell, None)
        resume = str(scratch / "first.ckpt")
        first.save_checkpoint(resume)
    _fit(trainer(steps=steps, callbacks=[*own, *watched(scratch), _KeepStore(raw)]), cell, resume)


def _suite(scratch: Path) -> list[Callback]:
    """All of it but what only writes files."""
    return [c for c in suite(dirpath=scratch) if not isinstance(c, RootCauseReport | SceneRecorder)]


def _fit(trainer: Trainer, cell: Cell, resume: str | None) -> None:
    seed_everything(cell.seed, verbose=False)
    trainer.fit(Module(cell.task), *loaders(cell.task, cell.seed), ckpt_path=resume, weights_only=False)


def _trainer(
    *, steps: int, callbacks: list[Callback], scratch: Path, needs: frozenset[Needs], options: Mapping[str, Any]
) -> Trainer:
    more = dict(options)
    if Needs.LOSS_SCALER in needs:
        more["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    if Needs.RANKS in needs:
        more |= {"devices": 2, "strategy": "ddp_fork"}
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=VALIDATION_INTERVAL,
        check_val_every_n_epoch=None,
        default_root_dir=scratch,
        callbacks=callbacks,
        **more,
    )


def _read_only(plain: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(plain)


def _as_plain(mapping: MappingProxyType[Any, Any]) -> tuple[Callable[..., Any], tuple[dict[Any, Any]]]:
    return _read_only, (dict(mapping),)


copyreg.pickle(MappingProxyType, _as_plain)  # type: ignore[arg-type]
