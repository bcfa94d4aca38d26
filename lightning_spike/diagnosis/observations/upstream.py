"""Evidence about whether steps, batches or writes caused trouble in the layers, or the layers themselves."""

from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.batch_ranges import NEAR
from lightning_spike.diagnosis.observation import Observation, Observer, first_of, observer
from lightning_spike.diagnosis.observations.experiments import step_size_test
from lightning_spike.diagnosis.observations.rates import JUMPS, SCHEDULED, climbed, rate_event
from lightning_spike.diagnosis.observations.shared_evidence import (
    batch_values,
    early_gradient,
    gradient_vanished_before,
    jump_after_ordinary_updates,
    transient_loss,
)
from lightning_spike.diagnosis.observations.step_length import oversized_first_updates
from lightning_spike.diagnosis.view import EpisodeView

WRITES: Final = ("weights", "optimizer_state")


@observer("event", "climb")
def rate_upstream(view: EpisodeView) -> Observation | None:
    """A learning rate that rose again, jumped or climbed."""
    moved = rate_event(view, SCHEDULED + JUMPS)
    if moved is not None:
        text = f"Possibly caused by the learning rate: {moved.text}."
        return Observation(text, level="event", signal=moved.signal, step=moved.step)
    rose = climbed(view)
    if rose is None:
        return None
    text = f"Possibly caused by the learning rate: {rose.text}."
    return Observation(text, level="climb", signal=rose.signal, observed=rose.now, expected=rose.usual)


@observer("exploded", signal="grad_norm")
def gradient_upstream(view: EpisodeView) -> Observation | None:
    """A gradient that exploded before: it damages any layer."""
    lead = early_gradient(view)
    if lead is None:
        return None
    size = sentences.times(lead.ratio)
    text = f"Before, the gradient norm was {size} its usual {lead.expected:.3g}: such a step damages weights."
    return Observation(text, expected=lead.expected)


@observer("long update", signal="update_norm")
def _long_update(view: EpisodeView) -> Observation | None:
    size = view.worst("update_norm", view.onset - 2 * NEAR, view.onset - 1)
    if size is None or not size.above:
        return None
    return Observation(f"An update before was {sentences.times(size.ratio)} as long as usual.", expected=size.expected)


@observer("oversized first updates", signal="update_norm")
def _oversized_first_updates(view: EpisodeView) -> Observation | None:
    oversized = oversized_first_updates(view.store)
    if oversized is None or oversized.after.ordinal > view.onset:
        return None
    return Observation(f"{oversized.text} Such steps damage weights.", step=oversized.after.step)


@observer("steps too long", signal="lab/steps")
def _steps_too_long(view: EpisodeView) -> Observation | None:
    test = step_size_test(view)
    return None if test is None else Observation(sentences.step_size(test.result), step=test.at.step)


@observer("written", signal="outside_writes")
def write_upstream(view: EpisodeView) -> Observation | None:
    """Code outside the training step wrote into weights or optimizer state just before."""
    found = view.findings("outside_writes", *WRITES, first=view.onset - 2 * NEAR, last=view.onset)
    text = "Code outside the training step wrote into weights or optimizer state just before."
    return Observation(text, step=found[-1].at.step) if found else None


@observer("changed", signal="optimizer/settings")
def setting_upstream(view: EpisodeView) -> Observation | None:
    """A momentum, decay or epsilon that changed during training."""
    found = view.findings("optimizer", "settings_changed", first=0, last=view.last)
    if not found:
        return None
    return Observation(f"Possibly caused by a changed optimizer setting: {found[-1].text}", step=found[-1].at.step)


@observer("gradual")
def _gradual_rise(view: EpisodeView) -> Observation | None:
    if view.sudden is not False or gradient_vanished_before(view) is not None:
        return None
    return Observation("The loss rose over several batches, as after steps that damage the weights bit by bit.")


UPSTREAM: Final[tuple[Observer, ...]] = (
    rate_upstream,
    gradient_upstream,
    first_of("step_upstream", _long_update, _oversized_first_updates, _steps_too_long),
    write_upstream,
    setting_upstream,
    batch_values,
    transient_loss,
    first_of("rise_after_ordinary_updates", jump_after_ordinary_updates, _gradual_rise),
)
"""Other causes of damaged layers. A jump after ordinary updates with an ordinary batch speaks for the layers
themselves."""
