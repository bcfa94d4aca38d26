"""Recorded losses of real trainings: healthy ones stay quiet, and what is plain to see is seen.

`curves/real.json` holds the losses, how each run was made (`real_curve` is the one of
`benchmarks/detector_real_runs.py`), its batch
size, the sizes of the batches that were shorter, and where its faults begin. The faults are ones that raise the loss
above twice the
largest of the 64 before; how many of all faults are seen is what the benchmark measures.
"""

import json
from pathlib import Path

import pytest

from lightning_spike.detectors.episodes import EpisodeDetector
from lightning_spike.records import EpisodeKind, Moment, StepRow

CURVES = json.loads((Path(__file__).parent / "curves" / "real.json").read_text(encoding="utf-8"))
HEALTHY = [curve for curve in CURVES if curve["fault"] is None]
FAULTY = [curve for curve in CURVES if curve["onset"] is not None]
NEVER_LEARNT = [curve for curve in CURVES if curve["fault"] == "a rate too high from the start"]
BYTES = next(curve for curve in CURVES if "demo_bytes_corrupt" in curve["made"])
DIGITS = next(curve for curve in CURVES if curve["fault"] == "weights spoilt")


def watched(losses, batch_size, sizes=None):
    detector = EpisodeDetector()
    for step, loss in enumerate(losses):
        at = Moment(ordinal=step, step=step, epoch=0, batch_idx=step)
        size = (sizes or {}).get(str(step), batch_size)
        detector.observe(StepRow(at=at, values={"loss": loss}, batch_size=size, usual_batch_size=batch_size))
    detector.finish()
    return detector.episodes


def made(curve):
    return curve["made"]


@pytest.mark.parametrize("curve", HEALTHY, ids=made)
def test_a_healthy_run_has_no_episode(curve):
    assert watched(curve["losses"], curve["batch_size"], curve["sizes"]) == ()


@pytest.mark.parametrize("curve", FAULTY, ids=made)
def test_every_fault_is_seen_where_it_began_and_nothing_before(curve):
    onsets = curve["onset"] if isinstance(curve["onset"], list) else [curve["onset"]]
    episodes = watched(curve["losses"], curve["batch_size"], curve["sizes"])
    for onset in onsets:
        assert any(abs(episode.onset.ordinal - onset) <= 5 for episode in episodes), (onset, episodes)
    assert all(episode.onset.ordinal >= min(onsets) - 5 for episode in episodes)


@pytest.mark.parametrize("curve", NEVER_LEARNT, ids=made)
def test_a_rate_too_high_from_the_start_is_a_divergence(curve):
    episodes = watched(curve["losses"], curve["batch_size"])
    assert EpisodeKind.DIVERGENCE in {episode.kind for episode in episodes}


def test_a_wild_loss_in_the_first_batches_is_seen_and_hides_none_of_the_later_ones():
    losses = list(BYTES["losses"][:152])
    losses[10], losses[110], losses[140] = 2698.0, 359198.0, 212648.0  # losses of corrupt files that were measured
    assert [episode.onset.ordinal for episode in watched(losses, 16)] == [10, 110, 140]


def test_ten_batches_of_enormous_losses_after_sixty_heavy_tailed_ones_are_one_spike():
    losses = [*DIGITS["losses"][:59], 1700.0, 9000.0, 53000.0, 20000.0, 11000.0, 4000.0, 8000.0, 3000.0, 2500.0, 1800.0]
    losses += DIGITS["losses"][20:59]
    (episode,) = watched(losses, 16)
    assert (episode.kind, episode.onset.ordinal) == (EpisodeKind.SPIKE, 59)


def test_one_batch_far_beyond_all_recent_ones_is_a_spike_although_the_tail_is_heavy():
    late = [0.08 * loss for loss in DIGITS["losses"][10:59]]
    losses = DIGITS["losses"][:59] + late + [2.17] + late
    assert any(episode.onset.ordinal == 59 + len(late) for episode in watched(losses, 16))
