"""What the benchmark of fixes does to a fault: only the samples that a fix names are mended."""

import importlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_spike.records import Change
from lightning_spike.testing import ExtremeValues, RateJump

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def fixes():
    """The scripts' folder is on the path for the import only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("fixes")


@pytest.fixture(scope="module")
def cell(fixes):
    return fixes.Cell(task="table", seed=3, sort="fault", name="ExtremeValues", causes=("bad_batch",))


def spoilt(fixes, cell, value):
    """The struck batch of a run before the fault, and after it with the fix applied."""
    fault = ExtremeValues(cell.at, 30.0)
    way = fixes.treatment(Change(setting="drop_samples", value=value), cell, [fault], cell.at)
    if way is None:
        return None
    (mended,) = way.callbacks
    mended.setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")
    before = {"features": torch.randn(16, 30), "y": torch.zeros(16, dtype=torch.int64), "weight": torch.ones(16)}
    return before, fault.before_batch(None, None, before, cell.at)


def test_named_samples_come_out_as_they_went_in_and_the_others_do_not(fixes, cell):
    order = fixes._order(cell, cell.at + 1)[cell.at]
    before, after = spoilt(fixes, cell, (order[2], order[7], 10**6))
    same = (before["features"] == after["features"]).all(dim=1)
    assert same.nonzero().flatten().tolist() == [2, 7]


def test_without_names_the_batch_of_the_onset_is_mended(fixes, cell):
    before, after = spoilt(fixes, cell, None)
    assert torch.equal(before["features"], after["features"])


def test_samples_of_other_batches_are_no_fix(fixes, cell):
    order = fixes._order(cell, cell.at + 1)
    elsewhere = tuple(set(order[cell.at - 1]) - set(order[cell.at]))
    assert spoilt(fixes, cell, elsewhere) is None


def test_dropping_samples_does_not_mend_a_learning_rate(fixes, cell):
    fault, done = RateJump(cell.at, 60.0, length=2), []
    vars(fault)["before_batch"] = lambda trainer, module, batch, ordinal: done.append(ordinal) or batch
    way = fixes.treatment(Change(setting="drop_samples", value=None), cell, [fault], cell.at)
    (mended,) = way.callbacks
    mended.setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")
    fault.before_batch(None, None, (torch.zeros(16, 2), torch.zeros(16)), cell.at)
    assert way.fault_goes_on
    assert done == [cell.at]


def test_a_value_is_applied_while_the_fault_goes_on(fixes, cell):
    fault = RateJump(cell.at, 60.0, length=2)
    way = fixes.treatment(Change(setting="lr-SGD", value=0.01), cell, [fault], cell.at)
    assert way.fault_goes_on
    assert [c.rate(own, 0) for c in way.callbacks for own in (0.6, 0.002)] == [0.01, 0.002]
    assert fixes.treatment(Change(setting="code", value="zero_grad"), cell, [fault], cell.at) is None
