"""The factors of updates that were made here: whose the damage is, and how many runs it takes to say so."""

import pytest
import torch
from lab.attached import attached
from lab.made import entry, moment, settings
from lab.shapes import CLASSES, FEATURES, Plain

from lightning_spike.lab.experiments.attribution import attribute
from lightning_spike.lab.experiments.damage_location import damage_on_the_way
from lightning_spike.lab.experiments.factors import Baselines
from lightning_spike.lab.experiments.remedies import try_remedies
from lightning_spike.lab.replay.reproduce import ReplayedUpdate, Reproduction
from lightning_spike.lab.replay.update import Update, make_update
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

RATE = 0.05
UPDATES = 8


class WithSGD(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)


def batch(generator, *, wrong=False):
    x = torch.randn(32, FEATURES, generator=generator)
    y = x[:, :CLASSES].argmax(1)
    return [x, (y + 1) % CLASSES if wrong else y]


def rerun(sandbox, rates, *, wrong_from=UPDATES):
    """The updates with these rates, the batches from one on with wrong labels; and ordinary batches."""
    generator = torch.Generator().manual_seed(1)
    updates_replayed = []
    for k, rate in enumerate(rates):
        update = Update(entries=(entry(k, batch(generator, wrong=k >= wrong_from)),), settings=(settings(rate),))
        updates_replayed.append(
            ReplayedUpdate(before=TrainState.take(sandbox, moment(k)), update=update, made=make_update(sandbox, update))
        )
    end = TrainState.take(sandbox, moment(len(rates)))
    again = Reproduction(
        updates_replayed=tuple(updates_replayed),
        end=end,
        reached=len(rates),
        steps=len(rates),
        differs_at=None,
        replayed=1.0,
    )
    return again, [entry(100 + k, batch(generator)) for k in range(4)]


def examined(rates, **options):
    """The attribution, the remedies, and how many updates the one and the other made."""
    torch.manual_seed(0)
    module = WithSGD()
    with isolated(attached(module), module, with_optimizers=True) as sandbox:
        for _ in range(60):  # the module learns first
            again, controls = rerun(sandbox, [RATE] * UPDATES)
        again, controls = rerun(sandbox, rates, **options)
        like = controls[0]
        damage = damage_on_the_way(sandbox, again, controls, like=like)
        updates_replayed = again.updates_replayed[damage.first : damage.last + 1]
        usual = [settings(RATE)] * 8
        around = Baselines(
            updates_replayed=again.updates_replayed[: damage.first + 1],
            controls=controls,
            settings=usual,
            defaults={},
            is_mixed=False,
        )
        before = sandbox.updates
        found = attribute(sandbox, damage, updates_replayed, around, controls, like=like, scatter=0.1)
        asked, before = sandbox.updates - before, sandbox.updates
        remedies = try_remedies(sandbox, damage, updates_replayed, around, controls, like=like, empties_state=False)
        return found, remedies, asked, sandbox.updates - before


def test_a_single_rate_out_of_the_ordinary_takes_three_runs_at_most():
    found, remedies, asked, tried = examined([*[RATE] * (UPDATES - 1), 400 * RATE])
    assert found.ordinal == UPDATES - 1
    assert found.shares[0].factor == "learning_rate"
    assert found.shares[0].share == pytest.approx(1.0, abs=0.2)
    assert not found.odd_batch
    assert "batch" in found.at_baseline
    assert asked <= 3
    assert "reset_state" not in {remedy.remedy for remedy in remedies}
    assert tried <= 2


def test_the_batches_after_a_blow_are_not_odd_for_what_the_blow_has_done():
    """Their losses are high under weights that are ruined, as everybody's are."""
    found, _, _, _ = examined([*[RATE] * (UPDATES - 3), 100 * RATE, 100 * RATE, 100 * RATE])
    assert not found.odd_batch
    assert found.shares[0].factor == "learning_rate"


def test_a_batch_with_wrong_labels_is_odd_and_weighed_against_the_rate():
    found, _, _, _ = examined([*[RATE] * (UPDATES - 1), 20 * RATE], wrong_from=UPDATES - 1)
    assert found.odd_batch
    assert {share.factor for share in found.shares} >= {"learning_rate", "batch"} or found.shares[0].factor == "batch"
    shares = {share.factor: share.share for share in found.shares}
    assert shares.get("batch", 0.0) > 0.25
