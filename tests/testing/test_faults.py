"""What every fault promises.

It changes what it says, at the batch it says, seen from any place in the list of callbacks, and leaves nothing behind.
"""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from testing.runs import AT, BATCHES, Items, Net, collate, different, optimizer_for, same, shape_for, train

from lightning_spike.errors import ConfigurationError
from lightning_spike.testing import DECOYS, FAULTS, UNCOVERED, Needs, WarmRestarts

ALL = (*FAULTS, *DECOYS, *UNCOVERED)
ELSEWHERE = {Needs.RANKS, Needs.RESUME}
"""What a plain run cannot offer: `test_ranks` and `test_resume`."""
HERE = [kind for kind in ALL if not ELSEWHERE & kind.NEEDS]
SHORT = {
    "ExpOverflow": {"strength": 1000.0},
    "LogOfZero": {"strength": 1000.0},
    "EpsilonUnderflow": {"strength": 0.1},
    "HarmlessTokens": {"strength": 0.1},
    "SortedStretch": {"length": 4},
    "SwingsAfterOverfitting": {"settle": 0, "batches": 2},
    "TokenDrift": {"ramp": 1},
}
"""Options that fit a run of a dozen batches."""
AT_ZERO = {"InitialWeightsScaled", "RateTooHigh"}

DATA = {"batch", "loss", "grads"}
INSIDE = {"loss", "grads"}
CHANGES = {
    "BitFlips": {"weights", "loss", "grads"},
    "CorruptTokens": DATA,
    "DivisionByZero": INSIDE,
    "DropoutSurge": INSIDE,
    "EvalModeLeftOn": {"modes", "loss", "grads"},
    "ExpOverflow": INSIDE,
    "ExtremeValues": DATA,
    "GradientsExplode": {"grads"},
    "GradientsNotZeroed": {"grads"},
    "GradientsOutgrowSecondMoment": {"grads"},
    "GradientsTurnRound": {"grads"},
    "GradientsVanish": {"grads"},
    "HarmlessNoise": DATA,
    "HarmlessRate": {"settings"},
    "HarmlessScale": DATA,
    "HarmlessTokens": DATA,
    "LogOfZero": INSIDE,
    "LossMultiplied": INSIDE,
    "LossScaleHeldDown": {"grads"},
    "LossScaleJumps": {"grads"},
    "MomentumTooHigh": {"settings"},
    "NonfiniteInput": DATA,
    "ParametersNotOptimized": {"settings", "grads"},  # nobody zeroes theirs
    "PenaltySwitchedOn": INSIDE,
    "RateCreepsUp": {"settings"},
    "RateJump": {"settings"},
    "SigmoidStack": INSIDE,
    "SortedStretch": DATA,
    "SqrtAtZero": {"grads"},
    "StateRescaled": {"state"},
    "StateScrambled": {"state"},
    "TokenDrift": DATA,
    "UnitsSaturate": INSIDE,
    "ValueDrift": DATA,
    "WeightsGrow": {"settings"},
    "WeightsOverwritten": {"weights", "loss", "grads"},
    "WeightsPileUp": DATA,
    "WrongLabels": DATA,
    "WrongResult": INSIDE,
}
"""By fault: what differs from the twin in the batch `AT`. All that is not named is the same to the bit. Those that
begin before it or later are below."""


def make(kind, at=AT, **options):
    return kind.strong(at=at, **{**SHORT.get(kind.__name__, {}), **options})


def where(kind):
    return {"shape": shape_for(kind), "optimizer": optimizer_for(kind), "scaler": Needs.LOSS_SCALER in kind.NEEDS}


def begins(kind):
    return 0 if kind.__name__ in AT_ZERO else AT


@functools.cache
def twin(shape, optimizer, scaler):
    """The run without a fault."""
    return train(shape=shape, optimizer=optimizer, scaler=scaler)


@functools.cache
def faulty(kind):
    """The run with the fault, which is first in the list."""
    return train(make(kind, begins(kind)), **where(kind))


def kinds(names):
    return [kind for kind in HERE if kind.__name__ in names]


@pytest.mark.parametrize("kind", kinds(CHANGES))
def test_it_changes_what_it_says_and_nothing_before(kind):
    run, healthy = faulty(kind), twin(**where(kind))
    assert [different(a, b) for a, b in zip(run.rows[:AT], healthy.rows[:AT], strict=True)] == [set()] * AT
    assert different(run.rows[AT], healthy.rows[AT]) == CHANGES[kind.__name__]


@pytest.mark.parametrize("kind", [kind for kind in HERE if kind.__name__ not in CHANGES])
def test_those_that_shape_the_run_from_its_first_batch_or_repeat_batches_change_it(kind):
    changed = [bool(different(a, b)) for a, b in zip(faulty(kind).rows, twin(**where(kind)).rows, strict=True)]
    assert any(changed)
    assert kind.FROM_START or not any(changed[: AT + 1])


@pytest.mark.parametrize("kind", HERE)
def test_it_is_seen_from_first_and_last_place_alike(kind):
    last = train(make(kind, begins(kind)), fault_first=False, **where(kind))
    assert [different(a, b) for a, b in zip(faulty(kind).rows, last.rows, strict=True)] == [set()] * BATCHES


WHERES = [
    {"shape": "tuple", "optimizer": "adamw", "scaler": False},
    {"shape": "tuple", "optimizer": "sgd", "scaler": True},
    {"shape": "nested", "optimizer": "sgd", "scaler": False},
    {"shape": "tokens", "optimizer": "adamw", "scaler": False},
]


def fitting(shape, optimizer, scaler):
    """The faults that a run of this kind has all for."""
    missing = {Needs.FLOAT_INPUT if shape == "tokens" else Needs.INTEGER_INPUT}
    missing |= {Needs.WEIGHT} if shape != "nested" else set()
    missing |= {Needs.ADAM} if optimizer != "adamw" else set()
    missing |= {Needs.LOSS_SCALER} if not scaler else set()
    return [kind for kind in HERE if not missing & kind.NEEDS]


@pytest.mark.parametrize("given", WHERES)
def test_faults_that_never_come_leave_the_run_as_it_is(given):
    """All at once: each would be seen."""
    faults = [make(kind, 1000) for kind in fitting(**given) if not kind.FROM_START]
    run, healthy = train(*faults, **given), twin(**given)
    assert [different(a, b) for a, b in zip(run.rows, healthy.rows, strict=True)] == [set()] * BATCHES
    assert same(run.module.state_dict(), healthy.module.state_dict())
    assert torch.equal(run.random, healthy.random)


def check_nothing_is_left(module, trainer, healthy):
    assert not {name for name in vars(module) if getattr(vars(module)[name], "__name__", "") == "stand_in"}
    assert not {"on_after_batch_transfer", "optimizer_zero_grad", "training_step"} & set(vars(module))
    assert not [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert not [p for p in module.parameters() if p._backward_hooks]
    left_by_schedules = {"params", "lr", "initial_lr"}
    for optimizer, usual in zip(trainer.optimizers, healthy.trainer.optimizers, strict=True):
        assert not optimizer._optimizer_step_post_hooks
        for group, own in zip(optimizer.param_groups, usual.param_groups, strict=True):
            assert len(group["params"]) == len(own["params"])
            assert {k: group[k] for k in group.keys() - left_by_schedules} == {
                k: own[k] for k in own.keys() - left_by_schedules
            }


@pytest.mark.parametrize("kind", HERE)
def test_nothing_is_left_behind(kind):
    run = faulty(kind)
    check_nothing_is_left(run.module, run.trainer, twin(**where(kind)))
    assert all(part.training for part in run.module.modules())
    assert same(vars(run.items), vars(Items(run.items.shape)))


class Stops(Callback):
    """An error of the user's, three batches after the fault."""

    def setup(self, trainer, pl_module, stage):
        self.trainer, self.module = trainer, pl_module

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == AT + 3:
            message = "the user's own"
            raise RuntimeError(message)


@pytest.mark.parametrize("given", WHERES)
def test_nothing_is_left_behind_when_the_run_breaks(given):
    """All faults at once, one inside the other."""
    stops = Stops()
    with pytest.raises(RuntimeError, match="the user's own"):
        train(*[make(kind, begins(kind)) for kind in fitting(**given)], stops, **given)
    check_nothing_is_left(stops.module, stops.trainer, twin(**given))


@pytest.mark.parametrize("kind", HERE)
def test_validation_batches_are_let_through(kind):
    seen = twin(**where(kind)).module.seen_in_validation
    assert seen
    assert same(faulty(kind).module.seen_in_validation, seen)


PARTS = {
    "ExtremeValues": {"image"},
    "FewBatches": None,
    "HarmlessNoise": {"image"},
    "HarmlessScale": {"image"},
    "NonfiniteInput": {"image"},
    "SortedStretch": {"image", "mask", "label"},
    "SwingsAfterOverfitting": None,
    "ValueDrift": {"image"},
    "WeightsPileUp": {"weight"},
    "WrongLabels": {"label"},
}
"""What a data fault changes in a nested batch; None: it puts whole batches in the place of others."""


def flat(batch):
    views, side = batch["views"]
    rest = {key: batch[key] for key in ("label", "weight", "ids")}
    return {**views, "side": side, **rest}


@pytest.mark.parametrize("kind", kinds(PARTS))
def test_of_a_nested_batch_only_the_part_that_it_names_is_changed(kind):
    where_nested = {"shape": "nested", "optimizer": "sgd", "scaler": False}
    run, healthy = train(make(kind), **where_nested), twin(**where_nested)
    later = AT + (5 if PARTS[kind.__name__] is None else 0)
    now, then = flat(run.rows[later].batch), flat(healthy.rows[later].batch)
    assert now.keys() == then.keys()
    changed = {key for key in now if not same(now[key], then[key])}
    if PARTS[kind.__name__] is not None:
        assert changed == PARTS[kind.__name__]
    else:
        assert now["note"] is None
        assert "image" in changed


@pytest.mark.parametrize("kind", ALL)
def test_bad_arguments_are_refused(kind):
    for wrong in ({"at": -1}, {"at": 1.5}, {"strength": "much"}, {"strength": float("nan")}, {"seed": -1}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            kind(**{"at": 0 if kind.__name__ in AT_ZERO else 50, **kind.MILD, **wrong})
    outside = max(kind.SCALE.above, kind.SCALE.at_least)
    if outside > float("-inf"):
        with pytest.raises(ConfigurationError, match=r"strength.*It is "):
            kind(**{"at": 50, **kind.MILD, "strength": outside - 1e-3})
    if kind.SCALE.at_most < float("inf"):
        with pytest.raises(ConfigurationError, match="strength"):
            kind(**{"at": 50, **kind.MILD, "strength": kind.SCALE.at_most + 1e-3})


@pytest.mark.parametrize("kind", ALL)
def test_mild_and_strong_differ_and_describe_themselves(kind):
    at = 0 if kind.__name__ in AT_ZERO else 50
    mild, strong = kind.mild(at=at).description, kind.strong(at=at, seed=3).description
    assert mild != strong
    assert (mild.fault, mild.cause, mild.at) == (kind.__name__, kind.cause, at)
    assert strong.seed == 3
    with pytest.raises(AttributeError):
        mild.at = 1


class WarmsUp(Net):
    """Its schedule begins at a fiftieth of the rate that it trains at."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_restart_is_a_factor_on_the_rate_that_the_module_trains_at_and_not_on_its_first_step():
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    run = Trainer(
        max_steps=BATCHES, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[WarmRestarts(at=AT, strength=10.0), Rates()],
    )  # fmt: skip
    items = Items("tuple")
    run.fit(WarmsUp(), torch.utils.data.DataLoader(items, 4, collate_fn=collate(items)))
    assert rates[0] == pytest.approx(0.05, rel=0.4)
    assert rates[AT] == pytest.approx(0.5)


class ByHand(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("kind", [kind for kind in ALL if Needs.AUTOMATIC_OPTIMIZATION in kind.NEEDS])
def test_optimisation_by_hand_is_refused_where_it_would_have_no_effect(kind):
    with pytest.raises(ConfigurationError, match="automatic optimisation"):
        kind.mild(at=5).prepare(Trainer(accelerator="cpu", logger=False), ByHand())


@pytest.mark.parametrize(
    ("need", "given"),
    [
        (Needs.FLOAT_INPUT, {"shape": "tokens"}),
        (Needs.INTEGER_INPUT, {"shape": "tuple"}),
        (Needs.WEIGHT, {"shape": "tuple"}),
        (Needs.ADAM, {"optimizer": "sgd"}),
        (Needs.LOSS_SCALER, {"scaler": False}),
        (Needs.RANKS, {}),
        (Needs.RESUME, {}),
    ],
)
def test_a_run_that_lacks_what_a_fault_needs_is_refused(need, given):
    kinds_that_need = [kind for kind in ALL if need in kind.NEEDS]
    assert kinds_that_need
    for kind in kinds_that_need:
        with pytest.raises(ConfigurationError, match="leave it out"):
            train(make(kind), **given)
