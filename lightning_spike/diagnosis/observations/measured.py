"""What the lab measured in the re-run of an episode, as causes ask for it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.records import EpisodeKind, Finding

GREW: Final = 30.0
"""Factor on a module's outputs in an ordinary batch from which an operation in or before it has lost its hold (x / ~0, exp); what a few updates change is far less."""

GREW_COMPUTED: Final = 10.0
"""… where what is computed is known to have changed: dropout and flat units make outputs larger as well, but by single factors; an engineering choice."""
COMPUTED: Final = 0.25
"""Share of the jump from which what is computed has changed (`lab.split`)."""
WILD: Final = math.log(1e4)
"""Scatter of the losses of ordinary batches, or of their logarithms, from which values blow up in some and not in others: training's own is below 1."""


def all_measured(case: Case) -> Iterator[Mapping[str, Any]]:
    """Every measurement of this episode, oldest first."""
    return (
        f.detail
        for f in case.store.findings
        if f.detector == "lab" and f.kind == "measured" and f.detail.get("episode") == case.episode.id
    )


def measured(case: Case, what: str) -> Mapping[str, Any] | None:
    """The newest measurement of one sort: `"modules"`, `"updates"`, `"precision"`, `"modes"`, `"loss_scale"` or `"samples"`."""
    return next(iter([d for d in all_measured(case) if d.get("what") == what][::-1]), None)


def grown_module(case: Case) -> tuple[str, float] | None:
    """The first module in the forward pass whose outputs are out of the ordinary, and the factor by which their root mean square has grown; `None` without one."""
    told = measured(case, "modules") or {}
    first, modules = told.get("first"), told.get("modules")
    if not isinstance(first, str) or not isinstance(modules, list | tuple):
        return None
    for module in modules:
        if isinstance(module, Mapping) and module.get("module") == first:
            now, usual = (_rms(module.get(key)) for key in ("now", "usual"))
            return (first, now / usual) if now is not None and usual is not None and usual > 0.0 else None
    return None


def computes_otherwise(case: Case) -> bool:
    """Whether the lab has found that what is computed has changed: the weights and batches of before have another loss than they had in the training."""
    share = number((case.lab("split") or {}).get("computation"))
    return share is not None and share >= COMPUTED


def blown_up(case: Case) -> tuple[str, float] | None:
    """The module whose outputs are many times as large with the weights and batches of before, and how many; `None` where what is computed has not changed, or not so."""
    grown = grown_module(case) if computes_otherwise(case) else None
    return grown if grown is not None and grown[1] >= GREW_COMPUTED else None


def falls_off(case: Case) -> tuple[str, str, float] | None:
    """How much more the gradient falls off on its way back than it did, where what is computed has changed: the module that gets least of it, a later one, and the factor; `None` without two that get any."""
    modules = (measured(case, "modules") or {}).get("modules")
    if not computes_otherwise(case) or not isinstance(modules, list | tuple):
        return None
    known = [(str(m.get("module")), _of(m, "now"), _of(m, "usual")) for m in modules if isinstance(m, Mapping)]
    kept = [(name, now / usual) for name, now, usual in known if now and usual]
    pairs = ((early, late) for k, early in enumerate(kept) for late in kept[k + 1 :])
    falls = [(early[0], late[0], late[1] / early[1]) for early, late in pairs]
    return max(falls, key=lambda fall: fall[2], default=None)


def _of(module: Mapping[str, Any], key: str) -> float | None:
    activity = module.get(key)
    return number(activity.get("gradient")) if isinstance(activity, Mapping) else None


def wild_scatter(case: Case) -> float | None:
    """How far apart the losses of ordinary batches are with the weights of before, or their logarithms where none is 0 or negative; `None` where they are in training's own range.

    That some of them lie orders of magnitude above the others, which had ordinary losses in the training, no single batch can bring about.
    """
    scatter, before = number((case.lab("split") or {}).get("noise")), number(case.episode.loss_before)
    if scatter is None or before is None or scatter < max(WILD, GREW * before):
        return None
    return scatter


def _rms(activity: object) -> float | None:
    return number(activity.get("rms")) if isinstance(activity, Mapping) else None


def steps_too_long(case: Case) -> Finding | None:
    """The newest finding that steps break the promise of their gradients: up to the onset, and at any time where nothing but a quiet run is known; `None` where there is none."""
    until = case.onset if case.kind is not EpisodeKind.STALL else case.last
    told = case.findings("lab", "steps_too_long", first=0, last=until)
    return told[-1] if told else None
