"""Updates and states with made-up numbers in them, for what only looks at them."""

import torch

from lightning_spike.lab.experiments.factors import Baselines
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import Update, UpdateOutcome
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.update_settings import PLACE
from lightning_spike.records import Moment
from lightning_spike.sandbox.state import TrainState
from lightning_spike.signals.random_state import RandomState


def moment(ordinal):
    return Moment(ordinal=ordinal, step=ordinal, epoch=0, batch_idx=ordinal)


def entry(ordinal, batch=None):
    return RingEntry(at=moment(ordinal), batch=[ordinal] if batch is None else batch, ids=None, rng=RandomState.take())


def settings(*rates, place=0):
    return [{PLACE: place, "lr": rate} for rate in rates]


def adam_state(ordinal, v=1.0, m=0.0, betas=(0.9, 0.999), eps=1e-8):
    held = {"exp_avg": torch.full((4,), m), "exp_avg_sq": torch.full((4,), v), "step": torch.tensor(float(ordinal))}
    group = {"lr": 0.1, "betas": betas, "eps": eps, "params": [0]}
    return TrainState(
        at=moment(ordinal),
        weights={"weight": torch.zeros(4)},
        optimizers=[{"state": {0: held}, "param_groups": [group]}],
    )


def leg(ordinal, before=None, rate=0.1):
    update = Update(entries=(entry(ordinal),), settings=(settings(rate),))
    made = UpdateOutcome(losses=(1.0,), gradients={}, spoilt_at=None)
    return ReplayedUpdate(before=before or adam_state(ordinal), update=update, made=made)


def around(updates_replayed, *, before=(), controls=(), defaults=None, is_mixed=False):
    return Baselines(
        updates_replayed=tuple(updates_replayed),
        controls=tuple(controls),
        settings=tuple(before),
        defaults=defaults or {},
        is_mixed=is_mixed,
    )
