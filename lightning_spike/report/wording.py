"""Words for numbers and facts, the same in the terminal and on the page."""

import math
from collections.abc import Sequence
from typing import Any

from lightning_spike.records import Action, Episode, Evidence, Family, Recovery, RunStatus, Verdict
from lightning_spike.report.model import Report, Suspect

ENDINGS = {
    RunStatus.RUNNING: "still running after",
    RunStatus.FINISHED: "finished after",
    RunStatus.STOPPED_EARLY: "stopped early after",
    RunStatus.EXCEPTION: "ended by an exception after",
    RunStatus.INTERRUPTED: "interrupted after",
}

RECOVERIES = {Recovery.WHOLE: "yes", Recovery.PART: "in part", Recovery.NEVER: "never", Recovery.OPEN: "open"}
MIN_SHOWN_RATIO = 1.05
"""Ratio of two losses from which it is shown; engineering choice."""


def number(value: float | None) -> str:
    """A number with three significant digits; `–` for `None`."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return f"{value:f}".replace("inf", "Inf").replace("nan", "NaN")
    if value == int(value) and abs(value) < 1e6:  # noqa: PLR2004 - whole numbers up to here read best as they are
        return f"{int(value):,}"
    return f"{value:.3g}"


def count(n: int, noun: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def percent(probability: float) -> str:
    """Whole percent; 0 and 100 only where it is exactly that."""
    if 0 < probability < 0.01:  # noqa: PLR2004 - less than what can be shown
        return "<1 %"
    if 0.99 < probability < 1:  # noqa: PLR2004 - more than what can be shown
        return ">99 %"
    return f"{round(100 * probability)} %"


def duration(seconds: float) -> str:
    """`0.8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:  # noqa: PLR2004 - shown with a decimal below ten seconds
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:  # noqa: PLR2004 - minutes in an hour
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ending(report: Report) -> str:
    """The run's end: `finished after 1,200 steps, 4 epochs, 12 s`."""
    done = [count(report.steps, "step"), count(report.epochs, "epoch"), duration(report.seconds)]
    return f"{ENDINGS[report.status]} {', '.join(done)}"


def setting(report: Report) -> str:
    """Device, precision and ranks: `cpu, 32-true`."""
    ranks = [f"{report.facts.world_size} ranks"] if report.facts.world_size > 1 else []
    resumed = [f"resumed at step {report.facts.first_step:,}"] if report.facts.first_step else []
    return ", ".join([*filter(None, [report.device, report.facts.precision]), *ranks, *resumed])


def headline(report: Report) -> str:
    """The number of episodes and the first cause, in one line."""
    if report.healthy:
        return "no trouble"
    found = [count(len(report.episodes), "episode")] if report.episodes else []
    if not report.causes:
        return ", ".join([*found, "unexplained"])
    first = report.causes[0]
    return ", ".join([*found, f"most likely {first.cause} ({percent(first.probability)})"])


def steps_words(episode: Episode) -> str:
    """`400–431`, `400` for a single step, `400–…` if the loss never recovered."""
    if episode.end is None:
        return f"{episode.onset.step:,}–…"
    if episode.end.step == episode.onset.step:
        return f"{episode.onset.step:,}"
    return f"{episode.onset.step:,}–{episode.end.step:,}"


def loss_words(episode: Episode) -> str:
    """`0.31 → 4.2 (×14)`, after the series' name if it is not the training loss."""
    before, peak = episode.loss_before, episode.loss_peak
    name = "" if episode.signal == "loss" else f"{episode.signal} "
    if before is None and peak is None:
        return f"{name}–"
    return f"{name}{number(before)} → {number(peak)}{_ratio(before, peak)}"


def _ratio(before: float | None, peak: float | None) -> str:
    """` (×14)`, empty for a ratio below 1.05 or an undefined one."""
    if before is None or peak is None or not math.isfinite(peak) or before <= 0:
        return ""
    ratio = peak / before
    return f" (×{number(float(f'{ratio:.2g}'))})" if ratio >= MIN_SHOWN_RATIO else ""


def recovery_words(episode: Episode) -> str:
    """Whether the loss recovered; `open` if the run ended before."""
    return RECOVERIES[episode.recovery]


def family_words(family: Family) -> str:
    """`learning rate`."""
    return family.value.replace("_", " ")


def confirmed_words(verdict: Verdict) -> str:
    """The result of the replay."""
    words = {True: "✓ confirmed by replay", False: "✗ not confirmed by replay", None: "– not tested by replay"}
    return words[verdict.confirmed]


def episodes_words(ids: tuple[int, ...]) -> str:
    """`episode 1`, `episodes 1–3, 7`."""
    if not ids:
        return "the whole run"
    ordered = sorted(set(ids))
    starts = [i for i in ordered if i - 1 not in ordered]
    ends = [i for i in ordered if i + 1 not in ordered]
    spans = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    return ("episode " if len(ordered) == 1 else "episodes ") + ", ".join(spans)


def evidence_words(evidence: Evidence) -> str:
    """Source and values of an observation: `lr-AdamW at step 400: 0.1, expected 0.001`."""
    where = evidence.signal if evidence.step is None else f"{evidence.signal} at step {evidence.step:,}"
    if evidence.observed is None:
        return where
    expected = "" if evidence.expected is None else f", expected {number(evidence.expected)}"
    return f"{where}: {number(evidence.observed)}{expected}"


def actions_words(actions: Sequence[Action]) -> list[str]:
    """One line per action, in order; the dumps of one episode share a line."""
    lines: list[str] = []
    listed: set[object] = set()
    for action in actions:
        episode = action.detail.get("episode")
        if action.action != "dump" or episode is None:
            lines.append(_action(action))
        elif episode not in listed:
            listed.add(episode)
            dumps = [a for a in actions if a.action == "dump" and a.detail.get("episode") == episode]
            lines.append(_dumps(episode, dumps))
    return lines


def _dumps(episode: object, dumps: Sequence[Action]) -> str:
    """The line of one episode's dumps, with the path of the onset's batch."""
    onset = next((d for d in dumps if d.detail.get("role", "onset") == "onset"), dumps[0])
    beside = f", with {len(dumps) - 1} of its neighbours" if len(dumps) > 1 else ""
    return f"episode {episode}: the batch of step {onset.at.step:,} is in {onset.detail.get('path', 'batches')}{beside}"


def _action(action: Action) -> str:
    """An action with the numbers and strings of its detail: `rollback at step 403: to_step 380, lr_scale 0.5`."""
    facts = [f"{key} {_scalar(value)}" for key, value in action.detail.items() if isinstance(value, str | int | float)]
    name = action.action.replace("_", " ")
    return f"{name} at step {action.at.step:,}" + (f": {', '.join(facts)}" if facts else "")


def suspects_words(suspects: Sequence[Suspect]) -> str:
    """Samples of one batch: `step 400: dataset index 17 (loss 9.5), position 2 in the batch`."""
    samples = []
    for suspect in suspects:
        index = suspect.dataset_index
        name = f"position {suspect.position} in the batch" if index is None else f"dataset index {index}"
        samples.append(name if suspect.loss is None else f"{name} (loss {number(suspect.loss)})")
    return f"step {suspects[0].step:,}: {', '.join(samples)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return number(float(value))
