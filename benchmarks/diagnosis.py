"""The benchmark of spike diagnosis: labelled faults in the middle of real trainings, and which cause the suite names.

    python benchmarks/diagnosis.py [--seed 0] [--seeds 3] [--jobs 2] [--task TASK ...] [--cause CAUSE ...] [--runs
    runs/] [--out diagnosis.json] [--picture confusion.png] [--fit FILE] [--wrong]

Nine tasks (images, text, a table, sequences, nested batches, patches, origins, colours, tags) x every cause of the
catalogue x two strengths x seeds, beside them clean twins of 2,000 steps, harmless decoys, faults that no cause covers,
scenes that look like another cause, and runs with two faults. Every run is recorded under `--runs`, so a run that was
stopped goes on where it was, and judging again (with other weights) takes no training; `--wrong` lists what was
misread.

A run is judged if it did harm (its loss is clearly worse than its clean twin's) or if anything was said about it.
Printed are AC@1, AC@3 and MRR with 95 % intervals (Wilson), by family, cause, task and strength, with the lab and
without it, beside two baselines; false alarms and probabilities in clean twins; onset errors; Brier score and
calibration error; the share confirmed by the lab. Probabilities are those of weights that are fitted on the other
tasks, leaving one out at a time; `--fit FILE` writes the one over all tasks, which is what
`lightning_spike/diagnosis/weights.json` holds.
"""

import argparse
import dataclasses
import functools
import json
import logging
import statistics
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

import torch
from labelled_runs.fitting import Example, as_file, example, fit
from labelled_runs.judging import (
    FAMILY,
    UNEXPLAINED,
    Judged,
    baseline_rules,
    brier,
    calibration_error,
    judge,
    without_lab,
)
from labelled_runs.runs import CLEAN_STEPS, Cell, all_cells, path_of, recorded, run
from labelled_runs.tasks import TASKS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shared.intervals import wilson

from lightning_spike.diagnosis.weights import Weights, fitted
from lightning_spike.store import TrainerStateStore

LABELLED: Final = ("fault", "confusable")
QUIET: Final = ("clean", "decoy")
LIKELY: Final = 0.2
"""Probability that no cause may reach in a clean twin."""
FIRST_THREE: Final = 3
DARK: Final = 0.6
"""Share from which a field of the picture is dark."""


def main(argv: Sequence[str] | None = None) -> None:
    """As said at the top."""
    chosen = _arguments(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seeds = range(chosen.seed, chosen.seed + chosen.seeds)
    cells = all_cells(seeds, chosen.task, chosen.cause)
    twins = [Cell(task=task, seed=seed, sort="clean", name="clean") for task in chosen.task for seed in seeds]
    chosen.runs.mkdir(parents=True, exist_ok=True)
    if not chosen.judge_only:
        _train_all(list(dict.fromkeys([*twins, *cells])), chosen.runs, chosen.jobs)
    there = [cell for cell in dict.fromkeys([*twins, *cells]) if path_of(chosen.runs, cell).exists()]
    with ProcessPoolExecutor(chosen.jobs) as pool:
        answers, weights = _answers(pool, there, chosen.runs, fit_anew=not chosen.as_shipped)
    _print(Console(width=180), answers, show_wrong=chosen.wrong)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(_for_json(answers), indent=1) + "\n")
    if chosen.picture is not None:
        _draw([a.judged for a in answers], chosen.picture)
    if chosen.fit is not None and weights is not None:
        made_by = " ".join(["python benchmarks/diagnosis.py", *(argv or sys.argv[1:])])
        chosen.fit.write_text(as_file(weights, made_by=made_by, runs=len(there)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--cause", nargs="+", choices=FAMILY, metavar="CAUSE", help="only faults of these causes")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where recorded runs are")
    parser.add_argument("--judge-only", action="store_true", help="train nothing, judge what is there")
    parser.add_argument("--as-shipped", action="store_true", help="with the package's own weights, fitted on all tasks")
    parser.add_argument("--wrong", action="store_true", help="list the runs that were misread")
    parser.add_argument("--out", type=Path, help="all answers as JSON")
    parser.add_argument("--picture", type=Path, help="the confusion matrix as a picture")
    parser.add_argument("--fit", type=Path, help="write weights.json fitted on all of the runs")
    return parser.parse_args(argv)


# -- training
# ------------------------------------------------------------------------------------------------------------


def _train_all(cells: Sequence[Cell], folder: Path, jobs: int) -> None:
    waiting = [cell for cell in cells if not path_of(folder, cell).exists()]
    if not waiting:
        return
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, cell, folder): cell for cell in waiting}
        for future in track(as_completed(futures), "training", total=len(futures)):
            error = future.result()
            if error is not None and not error.startswith(("RuntimeError", "ValueError", "FloatingPointError")):
                print(f"{futures[future].key}: {error}", flush=True)


# -- judging
# -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said of one run, by whom."""

    judged: Judged
    without: Judged
    """As if the lab had not been there."""
    by_rules: Mapping[str, str]
    """The baselines' guesses, by name; none of a run that broke."""


def _answers(
    pool: ProcessPoolExecutor, cells: Sequence[Cell], folder: Path, *, fit_anew: bool
) -> tuple[list[Answer], Weights | None]:
    """Each run with the calibration that was fitted on the runs of the other tasks, and the one over all."""
    if not fit_anew:
        return list(pool.map(functools.partial(_answer, folder, None, None), cells, chunksize=8)), None
    pairs = list(pool.map(functools.partial(_example, folder), cells, chunksize=8))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    fits: dict[str, list[Weights]] = {}
    for task in tasks:
        others = [pair for cell, pair in zip(cells, pairs, strict=True) if cell.task != task]
        fits[task] = [fit([pair[k] for pair in others]) if others else fitted() for k in (0, 1)]
    each = ([fits[cell.task][k] for cell in cells] for k in (0, 1))
    answers = list(pool.map(functools.partial(_answer, folder), *each, cells, chunksize=8))
    return answers, fit([pair[0] for pair in pairs])


def _example(folder: Path, cell: Cell) -> tuple[Example | None, Example | None]:
    """What there is to fit on in a run, with the lab and without."""
    found = recorded(folder, cell)
    return (None, None) if found is None else (example(found), example(without_lab(found)))


def _answer(folder: Path, with_lab: Weights | None, without: Weights | None, cell: Cell) -> Answer:
    found = recorded(folder, cell)
    if found is None:
        msg = f"{cell.key} is not there any more"
        raise FileNotFoundError(msg)
    twin = _twin(folder, cell.task, cell.seed)
    rules = {} if found.store is None else {name: rule(found.store) for name, rule in baseline_rules().items()}
    return Answer(judged=judge(found, twin, with_lab), without=judge(without_lab(found), twin, without), by_rules=rules)


@functools.lru_cache(maxsize=4)
def _twin(folder: Path, task: str, seed: int) -> TrainerStateStore | None:
    clean = recorded(folder, Cell(task=task, seed=seed, sort="clean", name="clean"))
    return None if clean is None else clean.store


# -- printing
# ------------------------------------------------------------------------------------------------------------


def _print(console: Console, answers: Sequence[Answer], *, show_wrong: bool) -> None:
    judged = [a.judged for a in answers]
    ours, bare = _labelled(judged), _labelled(a.without for a in answers)
    if ours:
        console.print(_whole(ours, bare, answers))
        for title, by in (
            ("family", lambda j: FAMILY.get(j.cell.causes[0])),
            ("cause", lambda j: j.cell.causes[0]),
            ("task", lambda j: j.cell.task),
            ("strength", lambda j: j.cell.strength if j.cell.sort == "fault" else j.cell.name),
        ):
            console.print(_by(title, by, judged, bare))
    console.print(_quiet(judged))
    if show_wrong:
        for j in ours:
            if j.named != j.cell.causes[0]:
                told = ", ".join(f"{name} {p:.2f}" for name, p in j.ranked[:4])
                print(f"{j.cell.key}: {'harm' if j.harmed else '-'} {j.episodes} episodes: {told}")


def _labelled(judged: Iterable[Judged]) -> list[Judged]:
    return [j for j in judged if j.cell.sort in LABELLED and j.counts]


def _share(right: int, of: int) -> str:
    low, high = wilson(right, of)
    return f"{right}/{of} {right / of:.2f} ({low:.2f}-{high:.2f})" if of else "-"


def _whole(ours: Sequence[Judged], bare: Sequence[Judged], answers: Sequence[Answer]) -> Table:
    table = Table(
        "", "AC@1", "family", "AC@3", "MRR", title="faults of a known cause, in tasks left out of the fitting"
    )
    table.add_row("with the lab", *_row(ours))
    table.add_row("without", *_row(bare))
    keys = {j.cell.key for j in ours}
    guessed = [(a.judged.cell.causes[0], a.by_rules) for a in answers if a.judged.cell.key in keys and a.by_rules]
    for name in baseline_rules():
        right = sum(rules[name] == cause for cause, rules in guessed)
        family = sum(FAMILY.get(rules[name]) == FAMILY.get(cause) for cause, rules in guessed)
        table.add_row(name, _share(right, len(guessed)), _share(family, len(guessed)), "-", "-")
    return table


def _row(judged: Sequence[Judged]) -> list[str]:
    places = [j.place(j.cell.causes[0]) for j in judged]
    return [
        _share(sum(p == 1 for p in places), len(judged)),
        _share(sum(FAMILY.get(j.named) == FAMILY.get(j.cell.causes[0]) for j in judged), len(judged)),
        _share(sum(p is not None and p <= FIRST_THREE for p in places), len(judged)),
        f"{statistics.fmean(0.0 if p is None else 1.0 / p for p in places):.3f}" if places else "-",
    ]


def _by(title: str, key: Callable[[Judged], object], judged: Sequence[Judged], bare: Sequence[Judged]) -> Table:
    table = Table(title, "runs", "judged", "AC@1", "AC@3", "without lab AC@1", "family", "confirmed", "named instead")
    everything = [j for j in judged if j.cell.sort in LABELLED]
    for name in sorted({str(key(j)) for j in everything}):
        of = [j for j in everything if str(key(j)) == name and j.counts]
        plain = [j for j in bare if str(key(j)) == name]
        first, family, three, _ = _row(of) if of else ["-"] * 4
        without, *_ = _row(plain) if plain else ["-"]
        sure = sum(j.confirmed is True for j in of)
        instead = Counter(j.named for j in of if j.named != j.cell.causes[0])
        table.add_row(
            name, str(sum(str(key(j)) == name for j in everything)), str(len(of)), first, three, without, family,
            f"{sure}/{len(of)}", ", ".join(f"{n} {k}" for n, k in instead.most_common(3)),
        )  # fmt: skip
    return table


def _quiet(judged: Sequence[Judged]) -> Table:
    table = Table("what else", "", title="where nothing, or two things, should be said")
    clean = [j for j in judged if j.cell.sort == "clean"]
    if clean:
        steps = CLEAN_STEPS * len(clean)
        episodes = sum(j.episodes for j in clean)
        truly = [j for j in clean if j.overfits and j.named == "overfitting"]
        told = episodes - sum(min(j.episodes, 1) for j in truly)
        table.add_row("clean twins: false episodes per 1,000 steps", f"{1000 * told / steps:.3f} ({told} in {steps})")
        loud = sum(_loudest(j) > LIKELY for j in clean if j not in truly)
        table.add_row(f"clean twins: a cause above {LIKELY}", _share(loud, len(clean)))
        table.add_row(
            "… beside twins that overfit by their own validations, and are told so",
            f"{len(truly)} of {sum(j.overfits for j in clean)}",
        )
    decoys = [j for j in judged if j.cell.sort == "decoy"]
    table.add_row(f"decoys: a cause above {LIKELY}", _share(sum(_loudest(j) > LIKELY for j in decoys), len(decoys)))
    for name in sorted({j.cell.name for j in judged if j.cell.sort == "uncovered"}):
        of = [j for j in judged if j.cell.name == name and j.counts]
        instead = Counter(j.first for j in of if j.first != UNEXPLAINED)
        told = ", ".join(f"{n} {k}" for n, k in instead.most_common(3))
        table.add_row(
            f"no cause covers {name}: unexplained first",
            f"{_share(sum(j.first == UNEXPLAINED for j in of), len(of))} {told}",
        )
    two = [j for j in judged if j.cell.sort == "two" and j.counts]
    both = sum(all((j.place(c) or 9) <= len(j.cell.causes) for c in j.cell.causes) for j in two)
    table.add_row("two faults: both first", _share(both, len(two)))
    _sure(table, judged)
    return table


def _sure(table: Table, judged: Sequence[Judged]) -> None:
    """How far probabilities, onsets and confirmations can be relied on."""
    ours = [*_labelled(judged), *(j for j in judged if j.cell.sort == "uncovered" and j.counts)]
    if ours:
        said = [(max(p for _, p in j.ranked), j.first == (j.cell.causes or (UNEXPLAINED,))[0]) for j in ours]
        table.add_row("calibration error (10 bins)", f"{calibration_error(said):.3f}")
        table.add_row("Brier score", f"{brier(ours):.3f}")
        errors = [abs(j.onset_error) for j in ours if j.onset_error is not None]
        if errors:
            worst = sorted(errors)[int(0.95 * (len(errors) - 1))]
            table.add_row(
                "onset error in batches: median, 95 %", f"{statistics.median(errors):g}, {worst} ({len(errors)} runs)"
            )
        sure = [j for j in ours if j.confirmed is True]
        table.add_row("first cause confirmed by the lab", _share(len(sure), len(ours)))
        right = sum(j.named in j.cell.causes for j in sure)
        table.add_row("… and right where confirmed", _share(right, len(sure)))
        harmed = [j for j in judged if j.cell.sort in LABELLED and j.harmed]
        table.add_row("did harm, and something was said", _share(sum(j.said for j in harmed), len(harmed)))


def _loudest(judged: Judged) -> float:
    return max((p for name, p in judged.ranked if name != UNEXPLAINED), default=0.0)


# -- writing
# -------------------------------------------------------------------------------------------------------------


def _for_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        dataclasses.asdict(a.judged) | {"judged": a.judged.counts, "without_lab": a.without.ranked} for a in answers
    ]


def _draw(judged: Sequence[Judged], path: Path) -> None:
    """Rows: what was put in; columns: what was named first; each row adds up to 1."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - only for the picture
    import numpy as np  # noqa: PLC0415

    names = [*FAMILY, UNEXPLAINED]
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for j in judged:
        if j.counts and (j.cell.sort in LABELLED or j.cell.sort == "uncovered"):
            counts[(j.cell.causes or (UNEXPLAINED,))[0], j.first if j.cell.sort == "uncovered" else j.named] += 1
    names.sort(key=lambda name: (FAMILY.get(name, "~"), name))
    matrix = np.array([[counts[a, b] for b in names] for a in names], dtype=float)
    rows = matrix.sum(axis=1, keepdims=True)
    figure, axes = plt.subplots(figsize=(11, 10), layout="constrained")
    axes.imshow(np.divide(matrix, rows, out=np.zeros_like(matrix), where=rows > 0), cmap="Blues", vmin=0, vmax=1)
    for (y, x), count in np.ndenumerate(matrix):
        if count:
            share = count / rows[y, 0]
            axes.text(
                x, y, f"{count:.0f}", ha="center", va="center", fontsize=7, color="white" if share > DARK else "black"
            )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), [f"{n} ({r:.0f})" for n, r in zip(names, rows[:, 0], strict=True)], fontsize=8)
    axes.set_xlabel("named first")
    axes.set_ylabel("put in (runs)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
