"""Observers: what they fill in, and how they are combined."""

from synthetic import Run, an_episode

from lightning_spike.diagnosis.observation import Observation, Observer, first_of, observer, only_if, premise
from lightning_spike.diagnosis.view import EpisodeView


@observer("seen", signal="grad_norm")
def seen(view):
    return Observation("Seen.")


@observer("far", "near")
def distance(view):
    return Observation("Near.", level="near", signal="lr", step=3)


@observer("nothing")
def _nothing(view):
    return None


def a_view():
    return EpisodeView(Run().store(), an_episode(120))


def test_an_observer_fills_in_its_only_level_its_signal_and_the_onset():
    view, found = a_view(), seen(a_view())
    assert (found.level, found.signal, found.step) == ("seen", "grad_norm", view.step)


def test_without_a_signal_an_observation_is_about_the_loss():
    view = a_view()
    assert Observer("loss", ("seen",), lambda view: Observation("Seen."))(view).signal == view.episode.signal


def test_what_an_observation_says_itself_counts():
    found = distance(a_view())
    assert (found.level, found.signal, found.step) == ("near", "lr", 3)
    assert Observer("setting", ("seen",), lambda view: Observation("Seen.", step=None))(a_view()).step is None


def test_the_first_of_several_observers_that_sees_something_counts():
    both = first_of("both", _nothing, seen, distance)
    assert both.levels == ("nothing", "seen", "far", "near")
    assert both(a_view()) == seen(a_view())


def test_an_observer_is_restricted_by_a_condition_and_keeps_its_levels_and_name():
    assert only_if(lambda view: False, seen)(a_view()) is None
    allowed = only_if(lambda view: True, seen, "other")
    assert (allowed.name, allowed.levels, allowed(a_view())) == ("other", seen.levels, seen(a_view()))
    assert only_if(lambda view: True, seen).name == "seen"


def test_a_premise_is_observed_only_where_it_does_not_hold():
    made = {"level": "none", "text": "No rate.", "signal": "lr"}
    assert premise("rate", lambda view: True, **made)(a_view()) is None
    found = premise("rate", lambda view: False, **made)(a_view())
    assert (found.level, found.text, found.signal, found.step) == ("none", "No rate.", "lr", a_view().step)
