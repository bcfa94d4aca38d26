"""What speaks for trouble that lies in the model's own layers, and against it.

Steps, batches and writes that may have brought it about.
"""

from typing import Final

from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.constants import NEAR
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
from lightning_spike.diagnosis.observations.step_length import wild_start
from lightning_spike.diagnosis.view import EpisodeView

WRITES: Final = ("weights", "optimizer_state")


@observer("event", "climb")
def rate_upstream(view: EpisodeView) -> Observation | None:
    """A learning rate that came back up, jumped or has climbed may have brought it about."""
    moved = rate_event(view, SCHEDULED + JUMPS)
    if moved is not None:
        text = f"Possibly caused by the learning rate: {moved.text}."
        return Observation(level="event", text=text, signal=moved.signal, step=moved.step)
    rose = climbed(view)
    if rose is None:
        return None
    text = f"Possibly caused by the learning rate: {rose.text}."
    return Observation(
        level="climb", text=text, signal=rose.signal, step=view.step, observed=rose.now, expected=rose.usual
    )


@observer("exploded")
def gradient_upstream(view: EpisodeView) -> Observation | None:
    """A gradient that exploded before leaves damage of any kind."""
    lead = early_gradient(view)
    if lead is None:
        return None
    text = f"The gradient norm was ×{lead.ratio:.3g} its usual {lead.expected:.3g} before; such a step leaves damage of any kind."
    return Observation(level="exploded", text=text, signal="grad_norm", step=view.step, expected=lead.expected)


@observer("long update")
def _long_update(view: EpisodeView) -> Observation | None:
    size = view.worst("update_norm", view.onset - 2 * NEAR, view.onset - 1)
    if size is None or not size.above:
        return None
    text = f"An update before was ×{size.ratio:.3g} as long as usual."
    return Observation(level="long update", text=text, signal="update_norm", step=view.step, expected=size.expected)


@observer("oversized first updates")
def _oversized_first_updates(view: EpisodeView) -> Observation | None:
    wild = wild_start(view.store)
    if wild is None or wild.after.ordinal > view.onset:
        return None
    text = f"{wild.text} Such steps leave damage of any kind."
    return Observation(level="oversized first updates", text=text, signal="update_norm", step=wild.after.step)


@observer("steps too long")
def _steps_too_long(view: EpisodeView) -> Observation | None:
    test = step_size_test(view)
    if test is None:
        return None
    return Observation(
        level="steps too long", text=sentences.step_size(test.result), signal="lab/steps", step=test.at.step
    )


@observer("written")
def write_upstream(view: EpisodeView) -> Observation | None:
    """Code outside the training step wrote into weights or optimizer state just before."""
    found = view.findings("outside_writes", *WRITES, first=view.onset - 2 * NEAR, last=view.onset)
    if not found:
        return None
    text = "Code outside the training step wrote into weights or optimizer state just before."
    return Observation(level="written", text=text, signal="outside_writes", step=found[-1].at.step)


@observer("changed")
def setting_upstream(view: EpisodeView) -> Observation | None:
    """A momentum, decay or epsilon that was changed while training ran does damage of its own."""
    found = view.findings("optimizer", "settings_changed", first=0, last=view.last)
    if not found:
        return None
    text = f"Possibly caused by a changed optimizer setting: {found[-1].text}"
    return Observation(level="changed", text=text, signal="optimizer/settings", step=found[-1].at.step)


@observer("gradual")
def _gradual_rise(view: EpisodeView) -> Observation | None:
    if view.sudden is not False or gradient_vanished_before(view) is not None:
        return None
    text = "The loss rose over several batches, as with steps that do damage bit by bit."
    return Observation(level="gradual", text=text, signal=view.episode.signal, step=view.step)


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
"""Whether something upstream has damaged the layers. A jump of the loss after ordinary updates with an ordinary batch
speaks for the layers themselves."""
