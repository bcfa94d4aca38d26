"""What the lab's experiments say for or against a cause: the share of the jump that they give to what the cause is about."""

import dataclasses
import math
from typing import Final

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import FAIR, REPLAYED, STRONG
from lightning_spike.diagnosis.observations.tells import tell
from lightning_spike.records import Evidence

MOST: Final = 0.5
"""Share of the jump from which the experiments confirm a cause (a repair fraction of one half, science.md 3.3)."""
SOME: Final = 0.25
"""… from which they speak for it."""
NONE: Final = 0.1
"""… up to which they refute it: the same jump comes without it."""


def with_experiment(cause: Cause, case: Case, examination: Examination) -> Examination:
    """What a cause says of a case, with what the experiments say added; as it is where they say nothing about it."""
    share = _share(cause, case)
    if share is None or (share > NONE and not examination.speaks):
        return (
            examination  # an experiment proves what something speaks for; by itself it names a group and no cause of it
        )
    confirmed = True if share >= MOST else False if share <= NONE else None
    return dataclasses.replace(
        examination,
        evidence=(*examination.evidence, _evidence(case, share)),
        confirmed=examination.confirmed if confirmed is None else confirmed,
    )


def _share(cause: Cause, case: Case) -> float | None:
    shares = case.blame
    if not shares or not cause.tested_by:
        return None
    share = sum(shares.get(group, 0.0) for group in cause.tested_by)
    return share if math.isfinite(share) else None


def _evidence(case: Case, share: float) -> Evidence:
    told = case.lab("factors") or case.lab("calm") or case.lab("split") or {}
    whose = (case.lab("blame") or {}).get("text")
    words = " ".join(str(text) for text in (told.get("text"), whose) if isinstance(text, str) and text)
    weight = REPLAYED if share >= MOST else FAIR if share >= SOME else -STRONG if share <= NONE else 0.0
    return tell("lab/blame", words or "The moment was run again.", weight, step=case.step, observed=share)
