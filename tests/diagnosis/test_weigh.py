"""The softmax and what goes before it, against sums worked out with numpy."""

import numpy as np
import pytest
from synthetic import a_cause

from lightning_spike.diagnosis.weigh import SYMPTOMS_OF, UPSTREAM_EVIDENCE, Examined, probabilities, symptoms, totals
from lightning_spike.diagnosis.weights import Weights
from lightning_spike.records import Evidence, Family

PLAIN = Weights(temper=0.5, unexplained=0.4)


def said(name, weight, **options):
    evidence = Evidence(signal="x", step=0, observed=None, expected=None, text="x", weight=weight)
    return Examined(a_cause(name, **options), (evidence,), None)


def softmax(logits):
    shares = np.exp(np.array(logits) - max(logits))
    return shares / shares.sum()


def test_three_causes_and_the_unexplained_share_one_softmax():
    found = [said("a", 3.0), said("b", -2.0), said("c", 0.5, prior=2.0)]
    expected = softmax([
        np.log(0.6 / 4) + 0.5 * 3.0, np.log(0.6 / 4) - 0.5 * 2.0, np.log(0.6 / 2) + 0.5 * 0.5, np.log(0.4)
    ])  # fmt: skip
    by_name = probabilities(found, {}, PLAIN)
    assert [by_name[name] for name in "abc"] == pytest.approx(expected[:3])


def test_an_offset_moves_its_cause_alone():
    found = [said("a", 3.0), said("b", 3.0)]
    moved = Weights(temper=0.5, unexplained=0.4, offsets={"a": 1.0})
    plain, after = (probabilities(found, {}, c) for c in (PLAIN, moved))
    assert np.log(after["a"] / after["b"]) == pytest.approx(np.log(plain["a"] / plain["b"]) + 1.0)


def test_half_of_the_prior_is_inherited():
    by_name = probabilities([said("a", 0.0), said("b", 0.0)], {"a": 0.9}, PLAIN)
    assert by_name["a"] / by_name["b"] == pytest.approx((0.5 * 0.3 + 0.5 * 0.9) / 0.3)


def test_what_speaks_for_the_cause_upstream_is_taken_off_the_symptom_and_the_strongest_counts_once():
    found = [said("a", 4.0, explains=["c"]), said("b", 1.0, explains=["c"]), said("c", 6.0)]
    assert totals(found) == {"a": 4.0, "b": 1.0, "c": 2.0}


def test_a_symptom_of_a_symptom_is_one_too():
    found = [said("a", 4.0, explains=["b"]), said("b", 3.0, explains=["c"]), said("c", 6.0)]
    assert totals(found) == {"a": 4.0, "b": -1.0, "c": 2.0}


def test_two_that_claim_each_other_are_left_alone():
    found = [said("a", 4.0, explains=["b"]), said("b", 3.0, explains=["a"])]
    assert totals(found) == {"a": 4.0, "b": 3.0}


@pytest.mark.parametrize("loud", [5.0, 50.0])
def test_a_symptom_never_outranks_a_cause_with_real_evidence_however_loud_it_is(loud):
    by_name = probabilities([said("a", UPSTREAM_EVIDENCE, explains=["b"]), said("b", loud)], {}, PLAIN)
    assert by_name["a"] > by_name["b"]


def test_a_cause_without_real_evidence_does_not_hold_a_symptom_down():
    by_name = probabilities([said("a", 0.5, explains=["b"]), said("b", 8.0)], {}, PLAIN)
    assert by_name["b"] > by_name["a"]


def test_a_cause_brings_about_the_symptoms_of_its_family_and_its_own_but_not_itself():
    data = a_cause("gradient_explosion", family=Family.DATA, explains=["b"])
    assert symptoms(data) == {"b"}
    assert symptoms(a_cause("x", family=Family.DATA)) == SYMPTOMS_OF[Family.DATA]
