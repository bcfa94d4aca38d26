"""Two gloo ranks in a process of their own.

Kept together nothing is found, one that drifts is named; a single process has nothing at all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from callbacks.watching import watched

from lightning_spike import RankSyncMonitor, suite
from lightning_spike.errors import ConfigurationError

SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Callback, seed_everything
from training_tasks import Digits, digits, train
from lightning_spike import RankSyncMonitor, TrainerStateStore
from lightning_spike.testing import GradientsNotAveraged, RankDrifts, WeightsOverwritten

torch.set_num_threads(1)


class OneFails(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 12:
            RankSyncMonitor.judge = None  # this rank's monitor breaks: the other must not wait for it


CASES = {
    "clean": ([], {}),
    "accumulation": ([], {"accumulate_grad_batches": 3}),
    "drifts": ([RankDrifts(10, 0.5)], {}),
    "not averaged": ([GradientsNotAveraged(10, 1.0, length=None)], {}),
    "one fails": ([OneFails()], {}),
}


class Tells(Callback):
    out = None

    def on_train_end(self, trainer, pl_module):
        store = TrainerStateStore.of(trainer)
        found = [[f.kind, f.at.ordinal, dict(f.detail)] for f in store.findings if f.detector == "ranks"]
        told = {"found": found, "disabled": len(store.disabled),
                "weights": float(sum(p.detach().double().sum() for p in pl_module.parameters()))}
        with open(f"{self.out}-{trainer.global_rank}.json", "w") as file:
            json.dump(told, file)


if __name__ == "__main__":
    for name, (faults, options) in CASES.items():
        seed_everything(0, verbose=False)
        tells = Tells()
        tells.out = f"{sys.argv[1]}/{name}"
        monitor = RankSyncMonitor(every=4)
        options = {**options, "devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
        train(Digits(), [*faults, monitor, tells], sys.argv[1], dataset=digits(480), batch_size=8, **options)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603 - the script above
        [sys.executable, "-W", "ignore", str(folder / "script.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda case: [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["clean", "accumulation"])
def test_ranks_that_stay_together_are_no_finding(told, case):
    for rank in told(case):
        assert rank["found"] == []
        assert rank["disabled"] == 0


@pytest.mark.ddp
def test_a_rank_that_drifts_is_found_on_both(told):
    for rank in told("drifts"):
        kinds = {kind: (at, detail) for kind, at, detail in rank["found"]}
        at, detail = kinds["weights_differ"]
        assert at == 12
        assert detail["last_equal"] == 8
        assert detail["count"] == detail["of"] == 6
        assert detail["ranks"] == [1]
        assert "gradient_differs" not in kinds


@pytest.mark.ddp
def test_gradients_that_are_not_averaged(told):
    for rank in told("not averaged"):
        kinds = {kind: at for kind, at, _ in rank["found"]}
        assert kinds["gradient_differs"] == kinds["weights_differ"] == 12


@pytest.mark.ddp
def test_a_rank_whose_monitor_breaks_holds_nobody_up(told):
    first, second = told("one fails")
    assert (first["disabled"], second["disabled"]) == (0, 1)
    assert first["weights"] == pytest.approx(told("clean")[0]["weights"], rel=1e-12)


def test_a_single_process_has_nothing(tmp_path):
    store = watched("cnn", [RankSyncMonitor(every=1)], tmp_path, max_epochs=1)
    assert store.findings == []
    assert store.remarks == []
    assert not any(signal.startswith("ranks") for signal in (*store.layers, *store.layer_names))
    assert any(isinstance(callback, RankSyncMonitor) for callback in suite())


@pytest.mark.parametrize("bad", [0, 1.5, "2", True])
def test_a_bad_argument_is_refused_at_construction(bad):
    with pytest.raises(ConfigurationError, match="every"):
        RankSyncMonitor(every=bad)
