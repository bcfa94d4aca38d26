"""The sentences, with the numbers in them."""

from lightning_spike.lab.experiments.attribution import Attribution, Share
from lightning_spike.lab.experiments.blame import GROUPS, Blame
from lightning_spike.lab.experiments.cooldown_test import Cooldown
from lightning_spike.lab.experiments.remedies import Remedy
from lightning_spike.lab.experiments.step_size import Consistency
from lightning_spike.lab.experiments.wording import (
    blame_text,
    calm_text,
    consistency_text,
    differences_text,
    factors_text,
    remedies_text,
)
from lightning_spike.lab.replay.compare import Difference
from lightning_spike.record.outside_writes import OutsideWrite


def share(factor, part, error=0.05):
    return Share(factor=factor, group="optimizer", share=part, error=error)


def found(**changes):
    fields = {
        "ordinal": 7, "step": 7, "updates": 1, "damage": 1.0986, "shares": (share("learning_rate", 0.9),), "finer": (),
        "odd_batch": True, "intrinsic": -0.002, "normal": ("epsilon",),
    }  # fmt: skip
    return Attribution(**(fields | changes))


def test_the_update_and_its_factors():
    assert factors_text(found()) == (
        "The update at step 7 made the loss of ordinary batches 3 times as high. Of that 90% ± 5% is due to the learning rate; with all of that as usual "
        "0% of the damage is left. As usual: epsilon."
    )


def test_several_updates_an_ordinary_batch_and_a_closer_look():
    text = factors_text(found(updates=3, odd_batch=False, finer=(share("momentum", 0.5, float("nan")),)))
    assert text.startswith("The 3 updates from step 7 on")
    assert "Looked at more closely, 50% is due to the momentum." in text
    assert text.endswith("The batch had an ordinary loss before it.")


def test_who_is_to_blame_the_largest_first():
    shares = dict.fromkeys(GROUPS, 0.0) | {"data": 0.2, "learning_rate": 0.78, "outside": 0.02}
    expected = "By experiment the jump is due to the learning rate of that update (78%) and the batch (20%)."
    assert blame_text(Blame(shares=shares)) == expected
    assert "do not say" in blame_text(Blame(shares={}))


def test_remedies_are_those_that_help():
    tried = [
        Remedy(remedy="lower_rate", value=0.1, repaired=1.3),
        Remedy(remedy="clip", value=0.5, repaired=0.4),
        Remedy(remedy="reset_state", value=None, repaired=-2.0),
    ]
    assert remedies_text(tried) == (
        "At that update would have helped: 0.1 times the learning rate (100% less damage) and clipping the gradients at 0.5, their usual norm (40% less "
        "damage). That is no sign of what was wrong."
    )
    assert remedies_text(tried[2:]).startswith("None of the usual remedies")


def test_calm_and_consistency():
    assert calm_text(Cooldown(before=2.0, after=1.8, steps=12)).endswith("the batch itself is out of the ordinary.")
    assert "thrown about" in calm_text(Cooldown(before=2.0, after=0.1, steps=12))
    steps = Consistency(rho=0.5, worsened=0.25, against=0.0, updates=12)
    assert consistency_text(steps).startswith("Of the 12 updates before, 3 made the loss of their own batch worse")


def test_what_was_written_and_what_differs():
    write = OutsideWrite(ordinal=3, kind="weights", names=("a", "b", "c", "d"))
    text = differences_text([Difference(name="a", kind="weights", relative=0.5)], [write])
    assert text == (
        "Most different now: a (by 0.5 of its size). Somebody other than the training step wrote into a, b and c and others."
    )
    assert differences_text([], []) == ""
