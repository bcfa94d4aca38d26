import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import ADAMW, SGD, WARM_RESTARTS, Run, a_cause, an_episode, moment

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.diagnosis.weigh import UPSTREAM_EVIDENCE
from lightning_spike.experiments import Experiments
from lightning_spike.records import EpisodeKind, Finding, Recovery, RunFacts, StepRow, ValidationPoint
from lightning_spike.store import TrainerStateStore

ANY = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 1e300])
)
SIGNALS = (
    "loss",
    "grad_norm",
    "lr-AdamW",
    "lr-SGD/pg1",
    "batch/input/max_abs",
    "batch/input/std",
    "batch/input/mean",
    "batch/input/nonfinite",
)
DETAIL = st.dictionaries(
    st.sampled_from(
        [
            "episode",
            "verdict",
            "data",
            "text",
            "phase",
            "module",
            "operation",
            "name",
            "losses",
            "median_loss",
            "dataset_indices",
            "metric",
            "gl",
        ]
    ),
    st.one_of(
        st.none(),
        ANY,
        st.integers(0, 2),
        st.text(max_size=5),
        st.lists(ANY, max_size=3),
        st.sampled_from(["data", "input", "forward"]),
    ),
)
KINDS = [("learning_rate", k) for k in ("restart", "cyclic_peak", "unexplained_jump", "nonfinite", "wrong_interval")]
KINDS += [("batch", "suspect_samples"), ("overfit", "gap_growing")]


@st.composite
def stores(draw):
    """Any run at all: missing signals, values that are not numbers, episodes that fit nothing."""
    length = draw(st.integers(0, 40))
    store = TrainerStateStore(
        RunFacts(
            started="",
            optimizers=draw(st.sampled_from([(), (ADAMW,), (SGD, ADAMW)])),
            schedulers=draw(st.sampled_from([(), (WARM_RESTARTS,)])),
            precision=draw(st.sampled_from(["32-true", "16-mixed", "bf16-mixed"])),
            gradient_clip_val=draw(st.sampled_from([None, 1.0])),
            gradient_clip_algorithm=draw(st.sampled_from([None, "norm", "value"])),
            max_steps=draw(st.sampled_from([None, 0, 3, 1000])),
            first_step=draw(st.sampled_from([0, 5])),
        )
    )
    signals = draw(st.lists(st.sampled_from(SIGNALS), unique=True))
    wild = draw(st.lists(ANY, min_size=1, max_size=8))
    for ordinal in range(length):
        values = {
            s: wild[(ordinal + k) % len(wild)] for k, s in enumerate(signals) if draw(st.booleans()) or ordinal % 2
        }
        store.append(StepRow(at=moment(ordinal), values=values, batch_size=draw(st.sampled_from([None, 1, 32]))))
    for number in range(draw(st.integers(0, 3))):
        onset = draw(st.integers(0, 45))
        store.replace_episode(
            an_episode(
                onset,
                onset + draw(st.integers(0, 5)),
                draw(st.sampled_from([None, onset, onset + 6])),
                id=number + 1,
                kind=draw(st.sampled_from(list(EpisodeKind))),
                before=draw(st.one_of(st.none(), ANY)),
                height=draw(st.one_of(st.none(), ANY)),
                recovery=draw(st.sampled_from(list(Recovery))),
                severity=draw(ANY),
                signal=draw(st.sampled_from(["loss", "val_loss", "loss/aux"])),
            )
        )
    for detector, kind in draw(st.lists(st.sampled_from(KINDS), max_size=4)):
        store.note(Finding(detector=detector, kind=kind, at=moment(draw(st.integers(0, 45))), detail=draw(DETAIL)))
    for found in draw(st.lists(st.builds(Experiments, episode=st.integers(1, 3)), max_size=2)):
        store.note(found)
    for ordinal in draw(st.lists(st.integers(0, 45), max_size=6)):
        store.note(
            ValidationPoint(
                at=moment(ordinal), metric="val_loss", value=draw(ANY), train_loss=draw(st.one_of(st.none(), ANY))
            )
        )
    return store


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(stores())
def test_whatever_the_run_the_verdicts_are_probabilities_and_no_cause_breaks(store):
    diagnosis = diagnose(store)
    assert not [r for r in diagnosis.remarks if "could not be examined" in r]
    assert set(diagnosis.per_episode) == {e.id for e in store.episodes}
    for verdicts in (*diagnosis.per_episode.values(), diagnosis.overall):
        assert all(0.0 <= v.probability <= 1.0 for v in verdicts)
        assert sum(v.probability for v in verdicts) <= 1.0 + 1e-9
        assert [v.probability for v in verdicts] == sorted((v.probability for v in verdicts), reverse=True)
        assert len({v.cause for v in verdicts}) == len(verdicts)
        assert all(v.summary and v.fixes for v in verdicts)
    assert diagnose(store) == diagnosis


def test_a_healthy_run_has_no_causes():
    diagnosis = diagnose(Run(3).store())
    assert diagnosis.overall == ()
    assert dict(diagnosis.per_episode) == {}


def _run(*episodes):
    run = Run(0, 300)
    run.episodes = list(episodes)
    return run.store()


@pytest.mark.parametrize("symptom", [1.0, 5.0, 50.0])
def test_a_symptom_never_outranks_its_cause(symptom):
    store = _run(an_episode(100, 100, 110))
    verdicts = diagnose(
        store, [a_cause("symptom", symptom), a_cause("cause", UPSTREAM_EVIDENCE, explains=["symptom"])]
    ).overall
    assert verdicts[0].cause == "cause"
    alone = diagnose(
        store, [a_cause("symptom", symptom), a_cause("cause", -UPSTREAM_EVIDENCE, explains=["symptom"])]
    ).overall
    assert alone[0].cause == "symptom"


def test_explaining_goes_through_what_lies_between():
    told = [
        a_cause("first", 4.0, explains=["second"]),
        a_cause("second", 0.1, explains=["third"]),
        a_cause("third", 30.0),
    ]
    assert diagnose(_run(an_episode(100, 100, 110)), told).overall[0].cause == "first"


def test_two_that_explain_each_other_are_left_alone():
    told = [a_cause("a", 5.0, explains=["b"]), a_cause("b", 6.0, explains=["a"])]
    assert [v.cause for v in diagnose(_run(an_episode(100, 100, 110)), told).overall] == ["b", "a"]


def test_more_evidence_makes_a_cause_more_probable():
    store = _run(an_episode(100, 100, 110))
    steps = [diagnose(store, [a_cause("a", w), a_cause("b", 1.0)]) for w in (0.5, 2.0, 5.0)]
    probabilities = [next(v.probability for v in d.overall if v.cause == "a") for d in steps]
    assert probabilities == sorted(probabilities)
    assert probabilities[0] < probabilities[-1]


def test_what_speaks_for_nothing_is_not_listed():
    assert diagnose(_run(an_episode(100, 100, 110)), [a_cause("a", 0.0), a_cause("b", -1.0)]).overall == ()


def test_over_the_run_an_episode_weighs_as_much_as_it_is_severe():
    first, second = an_episode(100, 100, 110, severity=90.0), an_episode(200, 200, 210, id=2, severity=10.0)
    early = a_cause("early", lambda view: 9.0 if view.onset == 100 else -9.0, confirmed=True)
    late = a_cause("late", lambda view: 9.0 if view.onset == 200 else -9.0, confirmed=False)
    diagnosis = diagnose(_run(first, second), [early, late])
    assert [v.cause for v in diagnosis.overall] == ["early", "late"]
    for verdict, episode, share in zip(diagnosis.overall, (1, 2), (0.9, 0.1), strict=True):
        assert verdict.probability == pytest.approx(share * diagnosis.per_episode[episode][0].probability)
        assert verdict.episodes == (episode,)
    assert [v.confirmed for v in diagnosis.overall] == [True, False]


def test_an_aftershock_takes_over_what_is_known_of_the_shock():
    early = a_cause("a", lambda view: 9.0 if view.onset == 100 else 0.2)
    shock = an_episode(100, 100, 110)
    near = diagnose(_run(shock, an_episode(120, 120, 125, id=2)), [early, a_cause("b", 0.2)])
    far = diagnose(_run(shock, an_episode(200, 200, 205, id=2)), [early, a_cause("b", 0.2)])
    assert near.per_episode[2][0].cause == "a"
    assert near.per_episode[2][0].probability > far.per_episode[2][0].probability + 0.05


def test_a_cause_that_breaks_costs_itself_and_is_named():
    def broken(_):
        msg = "no such thing"
        raise KeyError(msg)

    diagnosis = diagnose(_run(an_episode(100, 100, 110)), [a_cause("broken", broken), a_cause("fine", 6.0)])
    assert [v.cause for v in diagnosis.overall] == ["fine"]
    assert len(diagnosis.remarks) == 1
    assert "broken" in diagnosis.remarks[0]
    assert "no such thing" in diagnosis.remarks[0]


def test_thinned_and_short_histories_are_borne():
    store = _run(an_episode(100, 100, 110))
    short = TrainerStateStore(store.facts)
    short.append(StepRow(at=moment(0), values={"loss": math.nan}))
    short.replace_episode(
        an_episode(0, 0, None, kind=EpisodeKind.NONFINITE, before=None, height=math.nan, severity=99.0)
    )
    verdicts = diagnose(short).overall
    assert all(np.isfinite(v.probability) for v in verdicts)
    assert dataclasses.is_dataclass(diagnose(store))


def shown():
    """A cause that a finding is sufficient for."""

    def weight(view):
        return 9.0 if view.findings("watch", "broken", first=0, last=view.onset) else 0.0

    return a_cause(
        "shown", weight, sufficient_findings=frozenset({("watch", "broken")}),
        summary=lambda view: f"broken since step {view.step}",
    )  # fmt: skip


@pytest.mark.parametrize("part", ["summary", "fixes"])
def test_a_cause_that_cannot_be_put_into_words_costs_itself_and_is_named(part):
    def broken(_):
        msg = "no words"
        raise ValueError(msg)

    diagnosis = diagnose(
        _run(an_episode(100, 100, 110)), [a_cause("mute", 6.0, **{part: broken}), a_cause("fine", 5.0)]
    )
    assert [v.cause for v in diagnosis.overall] == ["fine"]
    assert "no words" in diagnosis.remarks[0]


def test_what_shows_a_cause_by_itself_is_told_though_the_loss_has_shown_nothing():
    store = Run(length=100).store()
    assert store.episodes == ()
    assert diagnose(store, [shown()]).overall == ()
    store.note(
        Finding(detector="watch", kind="broken", at=moment(70)), Finding(detector="watch", kind="broken", at=moment(60))
    )
    (verdict,) = diagnose(store, [shown()]).overall
    assert (verdict.cause, verdict.episodes, verdict.summary) == ("shown", (), "broken since step 60")
    assert verdict.probability > 0.9


def test_other_causes_have_no_say_where_there_is_no_episode():
    store = Run(length=100).store()
    store.note(Finding(detector="watch", kind="broken", at=moment(60)))
    told = diagnose(store, [shown(), *(c for c in catalogue() if not c.sufficient_findings)]).overall
    assert [v.cause for v in told] == ["shown"]
