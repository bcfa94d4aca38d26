"""Are the corrupted samples of a batch named, and no others.

    python benchmarks/samples.py [--seed 0] [--seeds 3] [--jobs 2] [--net NET ...] [--kind KIND ...] [--direct] [--out
    samples.json]

Six trainings with AdamW and batches of 32: an MLP and a CNN on digits, an autoencoder, a byte GRU, a byte Transformer,
and the MLP again with its batch as a nested dict. Of one batch 1, 3 or 8 samples are corrupted, in seven ways as far as
they fit the data. Printed is how many of the corrupted samples are named, and how many innocent ones for 32 samples:

* "finding": what the finding `suspect_samples` of the episode names, in runs of the whole suite in which an episode was
  seen at the struck batch;
* "direct": what the same naming says of the struck batch, whether or not there was an episode;
* the row "nothing": of a batch that nothing was done to, for each training.

Corrupted samples that are like the others' can have no name: a wrong label early in a training, where healthy losses
are as high.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shared.models import NETS, Task, loader
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from typing_extensions import override

from lightning_spike import RootCauseReport, TrainerStateStore, suite
from lightning_spike.callbacks.bad_batch_dumper import BadBatchDumper
from lightning_spike.callbacks.scene_recorder import SceneRecorder
from lightning_spike.signals.batch import BatchPart
from lightning_spike.testing.batch_edit import generator_for, leaves_of, replaced
from lightning_spike.testing.fault import Fault, Scale

AT: Final = 230
"""The batch that is struck, moved by up to 24 with the seed."""
AFTER: Final = 20
"""Batches trained after it, for an episode that is seen late."""
SIZE: Final = 32
COUNTS: Final = (1, 3, 8)
"""Corrupted samples."""
NESTED: Final = "nested"
NOTHING: Final = "nothing"


# -- what is put in
# ------------------------------------------------------------------------------------------------------


def _scaled(value: Tensor, _: torch.Generator) -> Tensor:
    return value * 30


def _salt_and_pepper(value: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the values are the smallest or the largest there is."""
    hit = torch.rand(value.shape, generator=generator) < 0.5  # noqa: PLR2004 - half
    extreme = (torch.rand(value.shape, generator=generator) < 0.5).to(value.dtype)  # noqa: PLR2004 - half
    return torch.where(hit, extreme, value)


def _with_nan(value: Tensor, generator: torch.Generator) -> Tensor:
    flat = value.clone().flatten(1)
    places = torch.randint(flat.shape[1], (len(flat), 1), generator=generator)
    return flat.scatter(1, places, float("nan")).view_as(value)


def _black(value: Tensor, _: torch.Generator) -> Tensor:
    return torch.zeros_like(value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to corrupt samples."""

    fits: frozenset[str]
    edit: Callable[[object, Tensor, torch.Generator], object]
    """From a batch, the positions of the samples, and random numbers."""


def _of_inputs(
    change: Callable[[Tensor, torch.Generator], Tensor],
) -> Callable[[object, Tensor, torch.Generator], object]:
    def edit(batch: object, chosen: Tensor, generator: torch.Generator) -> object:
        leaves = leaves_of(batch, BatchPart.INPUT, floating=True)
        return replaced(
            batch, {x.path: x.value.index_copy(0, chosen, change(x.value[chosen], generator)) for x in leaves}
        )

    return edit


def _wrong_labels(batch: object, chosen: Tensor, generator: torch.Generator) -> object:
    """Whole numbers become another one of those in the batch; images those of the next sample."""
    made = {}
    for leaf in leaves_of(batch, BatchPart.TARGET):
        value = leaf.value
        if value.is_floating_point():
            new = value[(chosen + 1) % len(value)]
        else:
            old, kinds = value[chosen], torch.unique(value)
            shift = torch.randint(1, len(kinds), old.shape, generator=generator)
            new = kinds[(torch.searchsorted(kinds, old) + shift) % len(kinds)]
        made[leaf.path] = value.index_copy(0, chosen, new)
    return replaced(batch, made)


def _random_tokens(batch: object, chosen: Tensor, generator: torch.Generator) -> object:
    """A file that is no text: drawn evenly between the smallest and the largest token; the targets follow from it."""
    tokens, following = leaves_of(batch, BatchPart.INPUT)[0], leaves_of(batch, BatchPart.TARGET)[0]
    low, high = int(tokens.value.min()), int(tokens.value.max())
    drawn = torch.randint(low, high + 1, (len(chosen), tokens.value.shape[1] + 1), generator=generator)
    return _with_windows(batch, chosen, drawn, tokens.path, following.path)


def _shuffled_tokens(batch: object, chosen: Tensor, generator: torch.Generator) -> object:
    """The right tokens in no order."""
    tokens, following = leaves_of(batch, BatchPart.INPUT)[0], leaves_of(batch, BatchPart.TARGET)[0]
    windows = torch.cat([tokens.value[chosen], following.value[chosen][:, -1:]], dim=1)
    order = torch.rand(windows.shape, generator=generator).argsort(dim=1)
    return _with_windows(batch, chosen, windows.gather(1, order), tokens.path, following.path)


def _with_windows(batch: Any, chosen: Tensor, windows: Tensor, tokens: Any, following: Any) -> object:
    x, y = batch[tokens[0]], batch[following[0]]
    new = {tokens: x.index_copy(0, chosen, windows[:, :-1]), following: y.index_copy(0, chosen, windows[:, 1:])}
    return replaced(batch, new)


FLOATS: Final = frozenset({"mlp", "cnn", "autoencoder", NESTED})
TOKENS: Final = frozenset({"gru", "transformer"})
KINDS: Final[Mapping[str, Kind]] = {
    "values x 30": Kind(fits=FLOATS, edit=_of_inputs(_scaled)),
    "salt and pepper": Kind(fits=FLOATS, edit=_of_inputs(_salt_and_pepper)),
    "one NaN": Kind(fits=FLOATS, edit=_of_inputs(_with_nan)),
    "all black": Kind(fits=FLOATS, edit=_of_inputs(_black)),
    "wrong labels": Kind(fits=FLOATS | TOKENS, edit=_wrong_labels),
    "random tokens": Kind(fits=TOKENS, edit=_random_tokens),
    "shuffled tokens": Kind(fits=TOKENS, edit=_shuffled_tokens),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One corruption of one batch of one training."""

    net: str
    seed: int
    kind: str
    count: int

    @property
    def at(self) -> int:
        """The batch that is struck."""
        return AT + (7 * self.seed) % 24

    @property
    def chosen(self) -> Tensor:
        """The corrupted positions."""
        return torch.randperm(SIZE, generator=generator_for(self.seed, self.count))[: self.count].sort().values

    def corrupt(self, batch: object) -> object:
        """The batch with its corrupted samples."""
        if self.kind == NOTHING:
            return batch
        return KINDS[self.kind].edit(batch, self.chosen, generator_for(self.seed, 100 + self.count))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was named."""

    case: Case
    how: str
    """`"finding"` or `"direct"`."""
    named: tuple[int, ...] | None
    """Positions; `None` where no episode was seen at the struck batch."""

    @property
    def found(self) -> int:
        """Corrupted samples that are named."""
        return len(set(self.named or ()) & self._corrupted)

    @property
    def innocent(self) -> int:
        """Others that are named."""
        return len(set(self.named or ()) - self._corrupted)

    @property
    def _corrupted(self) -> set[int]:
        return set(self.case.chosen.tolist()) if self.case.count else set()


class Corrupts(Fault):
    """Strikes one batch."""

    cause = None
    SCALE: ClassVar[Scale] = Scale(means="the number of corrupted samples", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 1}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 8}

    def __init__(self, case: Case) -> None:
        super().__init__(case.at, case.count, seed=case.seed)
        self.case = case

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        return self.case.corrupt(batch)


# -- the trainings
# -------------------------------------------------------------------------------------------------------


class NestedTask(Task):
    """The MLP; its batch is a dict with dicts, lists and numbers in it."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch["sample"]["image"], batch["sample"]["label"]], batch_idx)


def _nested(samples: Sequence[Any]) -> dict[str, Any]:
    x, y = default_collate(list(samples))
    return {"sample": {"image": x, "label": y}, "names": [f"digit {int(k)}" for k in y], "version": 3}


def _task(net: str) -> tuple[Task, Callable[[int], DataLoader[Any]]]:
    if net != NESTED:
        return Task(net, "AdamW", SIZE), lambda seed: loader(net, SIZE, seed)
    plain: Callable[[int], DataLoader[Any]] = lambda seed: loader("mlp", SIZE, seed)  # noqa: E731 - a shorthand

    def nested(seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            plain(seed).dataset, SIZE, shuffle=True, generator=generator, drop_last=True, collate_fn=_nested
        )

    return NestedTask("mlp", "AdamW", SIZE), nested


class Direct(Callback):
    """At the batch that is to be struck asks for the names in copies of it, each corrupted in another way."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.outcomes: list[Outcome] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at = self.cases[0].at
        dumper = next(c for c in trainer.callbacks if isinstance(c, BadBatchDumper))  # type: ignore[attr-defined]
        entry = dumper._ring.entry(at)  # noqa: SLF001 - the very naming of the dump, without an episode
        if trainer.global_step != at + 1 or entry is None:
            return
        for case in self.cases:
            struck = dataclasses.replace(entry, batch=case.corrupt(entry.batch))
            seen, _ = dumper._examine(struck, at, trainer, pl_module)  # noqa: SLF001 - as above
            self.outcomes.append(Outcome(case=case, how="direct", named=tuple(s.position for s in seen.suspects)))


def directly(net: str, seed: int, kinds: Sequence[str]) -> list[Outcome]:
    """One training, all ways to corrupt its batch."""
    nothing = Case(net=net, seed=seed, kind=NOTHING, count=0)
    fitting = [kind for kind in kinds if net in KINDS[kind].fits]
    direct = Direct([nothing, *(Case(net=net, seed=seed, kind=k, count=n) for k in fitting for n in COUNTS)])
    _train(net, seed, direct.cases[0].at + 1, [direct])
    return direct.outcomes


def by_finding(case: Case) -> list[Outcome]:
    """One training with a corrupted batch, and what its findings name."""
    store = _train(case.net, case.seed, case.at + AFTER, [Corrupts(case)])
    seen = {e.id for e in store.episodes if e.onset.ordinal == case.at}
    names = [
        f.detail["positions"] for f in store.findings if f.kind == "suspect_samples" and f.detail["episode"] in seen
    ]
    return [Outcome(case=case, how="finding", named=tuple(itertools.chain(*names)) if seen else None)]


def _train(net: str, seed: int, steps: int, callbacks: Sequence[Callback]) -> TrainerStateStore:
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    task, make_loader = _task(net)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        watching = [c for c in suite(dirpath=folder) if not isinstance(c, (RootCauseReport, SceneRecorder))]
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*watching, *callbacks], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(task, make_loader(seed))
    return TrainerStateStore.of(trainer)


# -- all of them
# ---------------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> Table:
    """Recall and innocents by kind, and in all."""
    out = Table(
        "corruption", "samples", "runs", "seen", "finding: named", "innocent / 32", "direct: named", "innocent / 32"
    )
    for kind in [k for k in (*KINDS, NOTHING) if any(o.case.kind == k for o in outcomes)]:
        of_kind = [o for o in outcomes if o.case.kind == kind]
        for count in COUNTS if kind != NOTHING else ():
            out.add_row(kind, str(count), *_figures([o for o in of_kind if o.case.count == count]))
        out.add_row(f"[b]{kind}", "[b]all", *_figures(of_kind), end_section=True)
    for net in sorted({o.case.net for o in outcomes}):
        out.add_row(net, "all", *_figures([o for o in outcomes if o.case.net == net and o.case.count]))
    out.add_section()
    out.add_row("[b]all", "", *_figures([o for o in outcomes if o.case.count]))
    return out


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    ended = [o for o in outcomes if o.how == "finding"]
    seen = [o for o in ended if o.named is not None]
    direct = [o for o in outcomes if o.how == "direct"]
    return [str(len(ended)), str(len(seen)), *_shares(seen), *_shares(direct)]


def _shares(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return ["", ""]
    found, there = sum(o.found for o in outcomes), sum(o.case.count for o in outcomes)
    innocent = sum(o.innocent for o in outcomes) / len(outcomes)
    return [f"{found}/{there} = {found / there:.3f}" if there else "", f"{innocent:.2f}"]


def _cases(nets: Iterable[str], seeds: Iterable[int], kinds: Sequence[str]) -> list[Case]:
    places = itertools.product(nets, seeds, kinds, COUNTS)
    return [Case(net=n, seed=s, kind=k, count=c) for n, s, k, c in places if n in KINDS[k].fits]


def main() -> None:
    """Run what was asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--net", nargs="+", default=[*NETS, NESTED], choices=[*NETS, NESTED])
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument(
        "--direct", action="store_true", help="only the naming itself: one training for all corruptions"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    seeds = range(options.seed, options.seed + options.seeds)
    cases = [] if options.direct else _cases(options.net, seeds, options.kind)
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(options.jobs, initializer=_quiet) as pool:
        futures = [pool.submit(directly, net, seed, options.kind) for net in options.net for seed in seeds]
        futures += [pool.submit(by_finding, case) for case in cases]
        for future in track(as_completed(futures), total=len(futures), console=console, description="trainings"):
            outcomes += future.result()
    if options.out:
        told = [dataclasses.asdict(o) | {"corrupted": o.case.chosen.tolist()} for o in outcomes]
        options.out.write_text(json.dumps(told, indent=1), encoding="utf-8")
    console.print(table(outcomes))


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
