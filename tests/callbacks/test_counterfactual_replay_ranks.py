"""Two gloo ranks in processes of their own.

A fault on one of them or on both is examined by both together, and the training does not notice.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from callbacks.test_counterfactual_replay import LATE

from lightning_spike.codec import from_plain
from lightning_spike.diagnosis.judgement import jump_shares, split_verdict
from lightning_spike.experiments import Experiments

SCRIPT = """
import json, sys
import torch
from callbacks.test_counterfactual_replay import (
    EARLY, LATE, SIZE, At, Losses, high_rate, nan_in_image, no_gradients, wrong_labels
)
from lightning.pytorch import Callback, seed_everything
from training_tasks import Digits, digits, train
from lightning_spike import CounterfactualReplay, TrainerStateStore
from lightning_spike.codec import to_plain
from lightning_spike.ranks import rank_agreement as wishes

torch.set_num_threads(1)


def on_rank_1(fault):
    return lambda trainer, module, batch: fault(trainer, module, batch) if trainer.global_rank == 1 else None


class Fails(Digits):
    # Where a step is run a second time, on rank 1 alone, as often as `times` says.
    times = 0

    def __init__(self):
        super().__init__()
        KNOWN.clear()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step in KNOWN and self.global_rank == 1 and len(FAILED) < self.times:
            FAILED.append(self.global_step)
            raise RuntimeError("only here")
        KNOWN.add(self.global_step)
        return loss


KNOWN, FAILED = set(), []
BEFORE = LATE - 48


class FailsOnce(Fails):
    times = 1


class FailsAlways(Fails):
    times = 10**6


class Tells(Callback):
    def __init__(self, out, losses):
        self.out, self.losses = out, losses

    def on_fit_end(self, trainer, pl_module):
        store = TrainerStateStore.of(trainer) if hasattr(trainer, "_lightning_spike") else None
        end = [*pl_module.state_dict().values(), torch.get_rng_state()]
        torch.save({"end": end, "losses": self.losses.losses}, f"{self.out}-{trainer.global_rank}.pt")
        if store is None:
            return
        found = [to_plain(e) for e in store.experiments.values()]
        episodes = [[e.id, e.kind, e.onset.ordinal] for e in store.episodes]
        told = {"found": found, "remarks": store.remarks, "episodes": episodes,
                "disabled": [d.reason for d in store.disabled],
                "replays": [a.detail["episode"] for a in store.actions if a.action == "replay"]}
        with open(f"{self.out}-{trainer.global_rank}.json", "w") as file:
            json.dump(told, file)


late, early = {"epochs": 9, "make": lambda: Digits(0.003)}, {"epochs": 3, "make": Digits}
nan = {"ordinal": EARLY, "start": on_rank_1(nan_in_image), "end": no_gradients}


class Breaks(Callback):
    # On rank 1 our own part fails: the other must not wait for it for long.
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 40:
            CounterfactualReplay._request = None


CASES = {
    "late": ({"ordinal": LATE - 1, "end": high_rate}, late | {"more": [At(BEFORE, start=on_rank_1(wrong_labels))]}),
    "nan": (nan, early),
    "at the end": ({**nan, "ordinal": 95}, early),
    "fails once": (nan, early | {"make": FailsOnce}),
    "fails always": (nan, early | {"make": FailsAlways}),
    "breaks": (nan, early | {"more": [Breaks()]}),
}
PLAIN = ("late", "nan")

if __name__ == "__main__":
    for name, (fault, options) in CASES.items():
        for kind in ("watched", "plain") if name in PLAIN else ("watched",):
            seed_everything(0, verbose=False)
            losses = Losses()
            suite = [CounterfactualReplay(budget=1.0)] if kind == "watched" else []
            told = Tells(f"{sys.argv[1]}/{name}-{kind}", losses)
            callbacks = [At(**fault), *options.get("more", []), *suite, losses, told]
            wishes.PATIENCE = 1.0 if name == "breaks" else 60.0
            train(
                options["make"](), callbacks, sys.argv[1], dataset=digits(1024), batch_size=SIZE,
                devices=2, strategy="ddp_fork", max_epochs=options["epochs"],
            )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603 - the script above
        [sys.executable, "-W", "ignore", str(folder / "script.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def told(folder):
    """By rank, what each noted of the lab."""

    def read(case):
        ranks = [json.loads((folder / f"{case}-watched-{rank}.json").read_text()) for rank in (0, 1)]
        return [rank | {"found": [from_plain(Experiments, e) for e in rank["found"]]} for rank in ranks]

    return read


def first_group(found):
    shares = jump_shares(found)
    return max(shares, key=shares.get)


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["late", "nan"])
def test_the_training_goes_on_as_if_nothing_had_been_run_again(folder, told, case):
    for rank in (0, 1):
        watched, plain = (torch.load(folder / f"{case}-{kind}-{rank}.pt") for kind in ("watched", "plain"))
        assert len(watched["losses"]) == len(plain["losses"]) > 90
        for a, b in zip([*watched["end"], *watched["losses"]], [*plain["end"], *plain["losses"]], strict=True):
            assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
        assert told(case)[rank]["disabled"] == []


@pytest.mark.ddp
def test_one_ranks_bad_batch_is_examined_by_both(told):
    first, second = told("late")
    found = second["found"][0]
    assert (split_verdict(found), found.replay.exact, found.rank) == ("data", True, 1)
    assert first_group(found) == "data"
    assert [onset for _, _, onset in first["episodes"]] == [LATE]
    (remark,) = first["remarks"]
    assert remark.startswith(f"Rank 1 saw a spike at step {LATE - 48}; this rank's loss did not show it.")
    assert "the batch itself causes the jump" in remark


@pytest.mark.ddp
def test_a_rate_that_jumps_on_both_later_is_blamed_on_both(told):
    first, second = told("late")
    for rank in (first, second):
        found = rank["found"][-1]
        assert split_verdict(found) == "weights"
        assert found.replay.exact
        assert first_group(found) == "learning_rate"
        assert found.attribution.ordinal == LATE - 1
    assert jump_shares(first["found"][-1]) == jump_shares(second["found"][-1])


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["nan", "at the end"])
def test_a_value_that_is_not_finite_is_traced_on_the_rank_that_had_it(told, case):
    first, second = told(case)
    born = second["found"][0].first_nonfinite
    assert (born.rank, born.phase, born.operation) == (1, "input", "batch[0]")
    assert split_verdict(second["found"][0]) == "data"
    assert first["found"] == []
    assert any(remark.startswith("Rank 1 saw a non-finite") for remark in first["remarks"])


@pytest.mark.ddp
def test_a_re_run_that_fails_on_one_rank_alone_ends_on_both(told):
    for rank in told("fails once"):
        assert rank["disabled"] == []
    replay = told("fails once")[1]["found"][0].replay
    assert not replay.exact
    assert "on rank 1, the replay failed: RuntimeError: only here" in replay.failure
    first, second = told("fails always")
    assert "on rank 1, the replay failed: RuntimeError: only here" in second["found"][0].not_run
    assert any("Not examined: on rank 1, the replay failed" in remark for remark in first["remarks"])


@pytest.mark.ddp
def test_a_rank_whose_suite_breaks_is_given_up(told):
    first, second = told("breaks")
    assert len(second["disabled"]) == 1
    assert (first["disabled"], first["found"]) == ([], [])
    assert any("another rank no longer sends its requests" in remark for remark in first["remarks"])


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["fails once", "fails always", "breaks"])
def test_and_the_training_goes_on(folder, case):
    for rank in (0, 1):
        failed, plain = (torch.load(folder / f"{name}-{rank}.pt") for name in (f"{case}-watched", "nan-plain"))
        assert all(torch.equal(a, b) for a, b in zip(failed["end"], plain["end"], strict=True))
