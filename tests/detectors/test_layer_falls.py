"""Gradients that no longer reach some layers and units that go flat, on series whose truth is known.

Healthy ones have no findings.
"""

import numpy as np
import pytest

from lightning_spike.detectors.layer_falls import FlatUnits, GradientFalls

SEEDS = range(10)


def gradients(seed, factors, *, at=200, length=400, loss_to=1.0):
    """Log-normal norms of some parameters, multiplied by `factors` from `at` on.

    Every fall with the batch at which it was told.
    """
    rng = np.random.default_rng(seed)
    norms = np.exp(0.6 * rng.standard_normal((length, len(factors)))) * np.array([1.0, 0.3, 3.0][: len(factors)])
    losses = np.exp(0.3 * rng.standard_normal(length))
    norms[at:] *= factors
    losses[at:] *= loss_to
    watch = GradientFalls()
    return [(t, fall) for t in range(length) if (fall := watch.push(norms[t], float(losses[t]))) is not None]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("factors", [(1e-5, 1e-2, 1.0), (1e-6, 1e-4, 0.05), (0.0, 1.0, 1.0)])
def test_gradients_that_die_out_are_told_once_and_soon(seed, factors):
    ((at, fall),) = gradients(seed, factors)
    assert 200 < at < 264
    assert fall.places[0] == 0
    assert 2 not in fall.places
    assert fall.before[0] == pytest.approx(1.0, rel=0.6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("factors", "loss_to"),
    [
        ((1.0, 1.0, 1.0), 1.0),
        ((1e-4, 1e-4, 1e-4), 1.0),
        ((1e-5, 1e-2, 1.0), 1e-3),
        ((100.0, 1.0, 1.0), 5.0),
        ((0.3, 0.5, 1.0), 1.0),
    ],
    ids=["healthy", "all alike", "the loss is gone", "one grows", "a little"],
)
def test_what_healthy_trainings_do_is_not_told(seed, factors, loss_to):
    assert gradients(seed, factors, loss_to=loss_to) == []


def test_rows_without_gradients_not_finite_or_of_another_length_are_borne():
    watch = GradientFalls()
    rows = [np.full(3, -1.0), np.zeros(3), np.full(3, np.nan), np.ones(2), np.full(3, np.inf)] * 60
    assert all(watch.push(row, 1.0) is None for row in rows)
    assert GradientFalls().push(np.ones(3), float("nan")) is None


def looks(*shares):
    watch = FlatUnits()
    return [(k, fall.places) for k, s in enumerate(shares) if (fall := watch.push(np.array(s))) is not None]


def test_a_layer_that_goes_flat_and_stays_so_is_told_once():
    alive, flat = [0.5, 0.45], [0.5, 0.97]
    assert looks(alive, alive, alive, flat, flat, flat, flat) == [(4, (1,))]


@pytest.mark.parametrize(
    "shares",
    [
        [0.5, 0.5, 0.5, 0.99, 0.5, 0.5],
        [0.5, 0.6, 0.7, 0.8, 0.88, 0.93, 0.96, 0.98],
        [0.99, 0.99, 0.99, 1.0, 1.0, 1.0],
        [-1.0, -1.0, -1.0, 1.0, 1.0],
        [np.nan, 0.5, 0.5, 1.0, 1.0],
        [0.5, 1.0, 1.0],
    ],
    ids=["one batch", "bit by bit", "always", "never ran", "unknown", "too early"],
)
def test_layers_that_were_flat_or_get_sparse_are_not_told(shares):
    assert looks(*([s] for s in shares)) == []
