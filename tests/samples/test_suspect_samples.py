import numpy as np
import pytest
import torch

from lightning_spike.samples.suspect_samples import find_suspects, sample_values
from lightning_spike.signals.batch import batch_leaves


def values(batch, size=16):
    return sample_values(batch_leaves(batch), size)


def images(seed: int, size: int = 16) -> torch.Tensor:
    return torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def classes(size: int = 16) -> torch.Tensor:
    return torch.arange(size) % 10


USUAL = [values((images(seed), classes())) for seed in range(100, 104)]


def test_every_sample_is_measured_as_numpy_does():
    x = torch.randn(16, 3, 5)
    x[2, 0, 0], x[3, 1, 1] = torch.nan, -torch.inf
    told = values((x, classes()))["input"]
    flat = np.where(np.isfinite(x.numpy()), x.numpy(), np.nan).reshape(16, -1)
    np.testing.assert_allclose(told.max_abs, np.nanmax(np.abs(flat), axis=1))
    np.testing.assert_allclose(told.std, np.nanstd(flat, axis=1), rtol=1e-5)
    assert told.nonfinite.tolist() == [0, 0, 1, 1] + [0] * 12


def test_only_tensors_along_the_batch_count():
    assert set(values({"x": images(0), "table": torch.ones(3, 4), "label": classes(), "scalar": torch.ones(())})) == {
        "input.x"
    }


@pytest.mark.parametrize("usual", [[], USUAL], ids=["alone", "against healthy batches"])
@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_batch_has_none(seed, usual):
    rng = np.random.default_rng(seed)
    losses, control = rng.exponential(size=(2, 16)) + 0.1
    assert find_suspects(values((images(seed), classes())), usual=usual, losses=losses, usual_losses=control) == []


@pytest.mark.parametrize("usual", [[], USUAL], ids=["alone", "against healthy batches"])
def test_extreme_values(usual):
    x = images(0)
    x[5] *= 100
    x[9] *= 30  # beside it the first must not be taken for usual
    suspects = find_suspects(values((x, classes())), usual=usual)
    assert [s.position for s in suspects] == [5, 9]
    assert suspects[0].max_abs == pytest.approx(float(x[5].max()))
    assert suspects[0].loss is None
    assert "largest value of input" in suspects[0].reasons[0]


def test_values_that_are_not_finite_come_first():
    x = images(0)
    x[3, 0, 2, 2] = torch.nan
    x[5] *= 1e6
    suspects = find_suspects(values((x, classes())), usual=USUAL)
    assert [s.position for s in suspects] == [3, 5]
    assert suspects[0].reasons == ("1 of 64 values of input are not finite",)


def test_a_blank_sample():
    x = images(0)
    x[7] = 0.25
    (suspect,) = find_suspects(values((x, classes())), usual=USUAL)
    assert suspect.position == 7
    assert find_suspects(values((torch.ones(16, 9), classes()))) == []


def test_a_batch_that_is_corrupt_all_through_stands_out_against_healthy_ones():
    corrupt = values((images(0) * 50, classes()))
    assert len(find_suspects(corrupt, usual=USUAL)) == 16
    assert find_suspects(corrupt) == []


def test_losses_far_above_the_others():
    losses = [0.1, 0.2, 0.05, 0.12, 9.0, 0.3, 0.07, 0.11, 0.2, 0.1, 0.15, 0.09, 0.1, 0.3, 0.2, np.nan]
    suspects = find_suspects(values((images(0), classes())), losses=losses)
    assert [(s.position, s.reasons) for s in suspects] == [
        (15, ("loss is nan",)),
        (4, ("loss 9, usually 0.12",)),
    ]


def test_losses_that_may_be_negative():
    losses = [-3.0, -3.1, -2.9, -3.2, -3.0, 4.0, -2.8, -3.1]
    (suspect,) = find_suspects({}, losses=losses)
    assert (suspect.position, suspect.loss) == (5, 4.0)


def test_wrong_labels_throughout_stand_out_against_a_healthy_batch():
    rng = np.random.default_rng(0)
    wrong, control = 6 + rng.random(16), 0.05 + 0.1 * rng.random(16)
    assert len(find_suspects({}, losses=wrong, usual_losses=control)) == 16


def healthy_losses(seed, count):
    return np.random.default_rng(seed).exponential(size=count) + 0.1


@pytest.mark.parametrize("kind", ["losses", "gradient_bounds"])
def test_against_many_healthy_samples_a_moderate_excess_is_enough(kind):
    own = -np.log1p(-(np.arange(32) + 0.5) / 33)  # as even a draw as there is
    usual = healthy_losses(1, 256)
    own[[4, 20]] = 13.0, 15.0
    suspects = find_suspects({}, **{kind: own, f"usual_{kind}": usual})
    assert [s.position for s in suspects] == [20, 4]
    assert "15" in suspects[0].reasons[0]


def test_what_the_losses_do_not_show_the_gradient_norms_do():
    losses = -np.log1p(-(np.arange(32) + 0.5) / 33)
    bounds = losses[::-1].copy()
    bounds[9] = 60.0
    usual = {"usual_losses": healthy_losses(1, 256), "usual_gradient_bounds": healthy_losses(3, 256)}
    (suspect,) = find_suspects({}, losses=losses, gradient_bounds=bounds, **usual)
    assert suspect.position == 9
    assert suspect.loss == losses[9]
    assert "gradient norm" in suspect.reasons[0]


def test_healthy_batches_seldom_have_a_name_in_them():
    """At a false discovery rate of 5 % for losses and for bounds, and of 2 % for each of two statistics of the
    values."""
    rng = np.random.default_rng(5)
    usual = [values((images(seed), classes())) for seed in range(200, 220)]
    named = 0
    for seed in range(200):
        suspects = find_suspects(
            values((images(seed), classes())),
            usual=usual,
            losses=rng.exponential(size=16),
            usual_losses=rng.exponential(size=256),
            gradient_bounds=rng.exponential(size=16),
            usual_gradient_bounds=rng.exponential(size=256),
        )
        named += bool(suspects)
    assert named <= 200 * 0.2


def smooth(seed, size=16):
    """Images whose neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, 8).expand(8, 8)
    return ramp * (0.5 + 0.5 * torch.rand(size, 1, 1, 1, generator=generator)) + 0.02 * torch.rand(
        size, 1, 8, 8, generator=generator
    )


def test_noise_within_the_usual_range():
    x = smooth(0)
    hit = torch.rand(8, 8, generator=torch.Generator().manual_seed(7)) < 0.5
    x[6, 0] = torch.where(hit, x[6, 0].round(), x[6, 0].flip(1))
    usual = [values((smooth(seed), classes())) for seed in range(100, 108)]
    (suspect,) = find_suspects(values((x, classes())), usual=usual)
    assert suspect.position == 6
    assert "difference between neighbours" in " ".join(suspect.reasons)


def test_a_batch_of_another_texture_throughout_is_no_heap_of_corrupt_samples():
    usual = [values((smooth(seed), classes())) for seed in range(100, 108)]
    assert find_suspects(values((images(0), classes())), usual=usual) == []


def test_the_differences_of_neighbours_are_those_of_numpy():
    x = images(0)
    told = values((x, classes()))["input"]
    np.testing.assert_allclose(
        told.jumps, np.sqrt((np.diff(x.double().numpy(), axis=-1) ** 2).mean((1, 2, 3))), rtol=1e-6
    )
    assert values((torch.randn(16), classes()))["input"].jumps.tolist() == [0.0] * 16
