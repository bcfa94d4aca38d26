"""Two gloo ranks under DDP.

Each runs its own batches again, gradients are synchronised as they were, and all comes out to the bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import json, sys
import torch
from lab.replay.test_reproduce import LAST, Probe
from lightning.pytorch import Callback, seed_everything
from training_tasks import Digits, digits, train
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay

torch.set_num_threads(1)
TASKS = {"cnn": {}, "accumulation": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}}


class Tells(Probe):
    out = None

    def on_train_end(self, trainer, pl_module):
        again, told = self.again, {"error": self.error, "rank": trainer.global_rank}
        if again is not None:
            told["differs_at"] = again.differs_at
            told["losses"] = again.replayed == self.recorded[LAST] and all(
                loss == self.recorded[entry.at.ordinal]
                for leg in again.updates_replayed for entry, loss in zip(leg.update.entries, leg.made.losses)
            )
            told["weights"] = all(torch.equal(again.weights[name], value) for name, value in self.weights.items())
            told["steps"] = again.steps
        with open(f"{self.out}/told-{trainer.global_rank}.json", "w") as file:
            json.dump(told, file)


class Keeps(Callback):
    def __init__(self, out):
        self.out = out

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{self.out}/end-{trainer.global_rank}.pt")


if __name__ == "__main__":
    for task, options in TASKS.items():
        for kind in ("watched", "plain"):
            out = f"{sys.argv[1]}/{task}-{kind}"
            seed_everything(0, verbose=False)
            suite = CounterfactualReplay()
            tells = Tells(suite)
            tells.out = out
            callbacks = [suite, tells] if kind == "watched" else []
            data = digits(768)
            options = {**options, "devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
            train(Digits(), [*callbacks, Keeps(out)], out, dataset=data, batch_size=8, **options)
"""


@pytest.mark.ddp
def test_every_rank_comes_out_to_the_bit_and_the_training_goes_on_as_if_nothing_had_been(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for name in ("cnn-watched", "cnn-plain", "accumulation-watched", "accumulation-plain"):
        (tmp_path / name).mkdir()
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603 - the script above
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for task in ("cnn", "accumulation"):
        for rank in (0, 1):
            told = json.loads((tmp_path / f"{task}-watched" / f"told-{rank}.json").read_text())
            assert told.pop("steps") > 5
            assert told == {"error": None, "rank": rank, "differs_at": None, "losses": True, "weights": True}
            watched, plain = (
                torch.load(tmp_path / f"{task}-{kind}" / f"end-{rank}.pt") for kind in ("watched", "plain")
            )
            assert all(torch.equal(watched[name], value) for name, value in plain.items())
