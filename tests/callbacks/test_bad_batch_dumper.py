"""Real trainings with one corrupt sample; which one, the dumps must tell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split
from training_tasks import build, train

from lightning_spike.actions.batch_dump import load_dump
from lightning_spike.callbacks.bad_batch_dumper import BadBatchDumper
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.errors import ConfigurationError
from lightning_spike.records import Episode, EpisodeKind
from lightning_spike.store import TrainerStateStore

SIZE, BATCH, BAD = 480, 8, 333


class Noisy(Dataset):
    """Inputs around a line, each drawn from its own index.

    The first input is the index itself, which the module leaves out. One sample is corrupt.
    """

    def __init__(self, corrupt=lambda x: x * 1e3, size: int = SIZE, bad: int = BAD) -> None:
        self.corrupt = corrupt
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        *x, noise = torch.randn(7, generator=torch.Generator().manual_seed(index))
        x = torch.stack(x)
        y = x.sum() + 0.5 * noise
        return torch.cat([torch.tensor([float(index)]), self.corrupt(x) if index == self.bad else x]), y


class Shuffled(Noisy):
    """The targets of some samples in a row are far off."""

    def __init__(self, wrong: range) -> None:
        super().__init__(lambda x: x)
        self.wrong = wrong

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x, y + 40.0 if index in self.wrong else y


class Stream(IterableDataset):
    def __iter__(self):
        data = Noisy()
        return (data[k] for k in range(SIZE))


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch[:2]
        loss = F.mse_loss(self.layer(x[..., 1:]).squeeze(-1), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root: Path, callbacks, loader=None, module=None, **options) -> Trainer:
    seed_everything(0, verbose=False)
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": root,
        "gradient_clip_val": 1.0,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**(defaults | quiet | options), callbacks=callbacks)
    trainer.fit(module or Line(), DataLoader(Noisy(), batch_size=BATCH) if loader is None else loader)
    return trainer


def dumps(trainer: Trainer, root: Path, role: str = "onset"):
    actions = [a for a in TrainerStateStore.of(trainer).actions if a.action == "dump" and a.detail["role"] == role]
    return [(a, load_dump(root / "spike" / a.detail["path"])) for a in actions]


def assert_names_the_bad_one(trainer: Trainer, root: Path) -> None:
    store = TrainerStateStore.of(trainer)
    assert store.disabled == []
    ((action, dump),) = dumps(trainer, root)
    assert BAD in dump.batch[0][:, 0].int().tolist()
    assert dump.manifest["dataset_indices"] == dump.batch[0][:, 0].int().tolist() == action.detail["dataset_indices"]
    assert action.detail["suspects"][0]["dataset_index"] == BAD
    (finding,) = [f for f in store.findings if f.kind == "suspect_samples"]
    assert finding.detail["dataset_indices"][0] == BAD
    assert finding.detail["episode"] == action.detail["episode"] == store.episodes[0].id
    assert str(BAD) in finding.detail["text"]


def test_names_the_corrupt_sample(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper()])
    assert_names_the_bad_one(trainer, tmp_path)
    ((action, _),) = dumps(trainer, tmp_path)
    at = BAD // BATCH
    assert (action.at.ordinal, action.at.step, action.detail["path"]) == (
        at, at, f"batches/step{at:06d}_epoch0_batch{at}_rank0",
    )  # fmt: skip


def test_a_stretch_of_bad_batches_is_named_to_its_end(tmp_path):
    """Five batches with wrong targets, the last of them to three quarters.

    All of their samples are named, and none of the good batches around.
    """
    wrong = range(40 * BATCH, 45 * BATCH - 2)
    callbacks = [BadBatchDumper(max_mb=0), CounterfactualReplay()]
    trainer = fit(tmp_path, callbacks, DataLoader(Shuffled(wrong), batch_size=BATCH), gradient_clip_val=0.01)
    store = TrainerStateStore.of(trainer)
    assert store.disabled == []
    (finding,) = [f for f in store.findings if f.kind == "suspect_batches"]
    assert finding.detail["episode"] == store.episodes[0].id
    assert finding.detail["ordinals"] == [40, 41, 42, 43, 44]
    assert set(wrong) <= set(finding.detail["dataset_indices"]) <= set(range(40 * BATCH, 45 * BATCH))
    assert "step 40 to 44" in finding.detail["text"]


def test_the_manifest_says_what_the_batch_was(tmp_path):
    module = Line()
    trainer = fit(tmp_path, [BadBatchDumper()], module=module)
    ((_, dump),) = dumps(trainer, tmp_path)
    manifest, position = dump.manifest, BAD % BATCH
    assert (manifest["step"], manifest["epoch"], manifest["batch_idx"], manifest["rank"]) == (
        BAD // BATCH,
        0,
        BAD // BATCH,
        0,
    )
    assert manifest["loss"] == pytest.approx(module.losses[BAD // BATCH])
    assert manifest["changed_in_place"] is False
    inputs = dump.batch[0].double().numpy()
    leaf = next(f for f in manifest["leaves"] if f["name"] == "input")
    assert (leaf["dtype"], leaf["shape"], leaf["path"]) == ("float32", [BATCH, 7], [0])
    assert leaf["statistics"]["std"] == pytest.approx(inputs.std(), rel=1e-4)
    samples = manifest["samples"]
    np.testing.assert_allclose(samples["input/max_abs"], np.abs(inputs).max(axis=1))
    assert samples["dataset_index"][position] == BAD
    assert np.argmax(samples["loss"]) == position
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_neighbours_are_written_too(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper(neighbours=2)])
    at = BAD // BATCH
    around = {dump.manifest["batch_idx"]: dump for _, dump in dumps(trainer, tmp_path, "neighbour")}
    assert sorted(around) == [at - 2, at - 1, at + 1, at + 2]
    for ordinal, dump in around.items():
        assert dump.batch[0][:, 0].tolist() == [float(k) for k in range(ordinal * BATCH, (ordinal + 1) * BATCH)]
        assert isinstance(dump.manifest["loss"], float)
    assert len(list((tmp_path / "spike" / "batches").iterdir())) == 5


@pytest.mark.parametrize("persistent", [False, True])
def test_shuffled_with_workers(persistent, tmp_path):
    loader = DataLoader(
        Noisy(), batch_size=BATCH, sampler=shuffled_but_late(), num_workers=2, persistent_workers=persistent
    )
    assert_names_the_bad_one(fit(tmp_path, [BadBatchDumper()], loader), tmp_path)


def test_a_subset(tmp_path):
    part, _ = random_split(Noisy(), [0.9, 0.1], generator=torch.Generator().manual_seed(2))
    part.indices = [k for k in part.indices if k != BAD]
    part.indices.insert(300, BAD)
    assert_names_the_bad_one(fit(tmp_path, [BadBatchDumper()], DataLoader(part, batch_size=BATCH)), tmp_path)


def shuffled_but_late() -> list[int]:
    """A random order in which the corrupt sample does not come before the loss has settled."""
    order = [k for k in torch.randperm(SIZE, generator=torch.Generator().manual_seed(4)).tolist() if k != BAD]
    return [*order[:350], BAD, *order[350:]]


def test_under_accumulation_the_whole_step_is_written_and_the_worst_is_the_onset(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper()], accumulate_grad_batches=2)
    assert_names_the_bad_one(trainer, tmp_path)
    ((onset, dump),) = dumps(trainer, tmp_path)
    ((_, other),) = dumps(trainer, tmp_path, "micro_batch")
    assert onset.at.batch_idx == BAD // BATCH
    assert other.manifest["step"] == dump.manifest["step"]
    assert {dump.manifest["batch_idx"], other.manifest["batch_idx"]} == {40, 41}


def test_a_stream_is_named_by_position_and_content(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper()], DataLoader(Stream(), batch_size=BATCH))
    ((action, dump),) = dumps(trainer, tmp_path)
    assert action.detail["dataset_indices"] == []
    assert (action.detail["suspects"][0]["position"], action.detail["suspects"][0]["dataset_index"]) == (
        BAD % BATCH,
        None,
    )
    assert len(dump.manifest["content_sha256"]) == 64
    assert any("IterableDataset" in remark for remark in TrainerStateStore.of(trainer).remarks)


def test_a_sample_that_is_not_finite(tmp_path):
    loader = DataLoader(Noisy(lambda x: x * torch.nan), batch_size=BATCH)
    trainer = fit(tmp_path, [BadBatchDumper()], loader)
    store = TrainerStateStore.of(trainer)
    ((action, dump),) = dumps(trainer, tmp_path)
    assert store.episodes[0].kind is EpisodeKind.NONFINITE
    assert (action.at.ordinal, action.detail["suspects"][0]["dataset_index"]) == (BAD // BATCH, BAD)
    assert dump.manifest["signals"]["batch/input/nonfinite"] == 6
    assert dump.manifest["loss"] == "nan"
    assert dump.manifest["losses_under"] is None


class Odd:
    """Something of the user's own in a batch."""


def odd_batch(samples):
    x, y = torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])
    return [x, y, None, {"names": [f"{int(v)}" for v in x[:, 0]], "own": Odd()}]


def test_a_nested_batch_with_things_that_are_no_tensors(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper()], DataLoader(Noisy(), batch_size=BATCH, collate_fn=odd_batch))
    assert_names_the_bad_one(trainer, tmp_path)
    ((_, dump),) = dumps(trainer, tmp_path)
    assert dump.batch[2] is None
    assert dump.batch[3]["names"][BAD % BATCH] == str(BAD)
    assert dump.batch[3]["own"].class_name.endswith("Odd")


def test_several_loaders_do_not_break_it(tmp_path):
    class Two(Line):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx) + 0.0 * self.layer(batch["b"][0][:, 1:]).sum()

    loaders = {
        "a": DataLoader(Noisy(), batch_size=BATCH),
        "b": DataLoader(torch.utils.data.Subset(Noisy(), range(20)), batch_size=4, shuffle=True),
    }
    trainer = fit(tmp_path, [BadBatchDumper()], loaders, Two())
    assert TrainerStateStore.of(trainer).disabled == []
    ((action, dump),) = dumps(trainer, tmp_path)
    assert dump.batch["a"][0][BAD % BATCH, 0] == BAD
    told = {part["loader"]: part["dataset_indices"] for part in dump.manifest["loaders"]}
    assert told == {"0": dump.batch["a"][0][:, 0].int().tolist(), "1": dump.batch["b"][0][:, 0].int().tolist()}
    assert action.detail["dataset_indices"] == []


def test_samples_one_by_one_do_not_break_it(tmp_path):
    loader = DataLoader(Noisy(), batch_size=None)
    trainer = fit(tmp_path, [BadBatchDumper()], loader)
    assert TrainerStateStore.of(trainer).disabled == []
    bad = [a for a, _ in dumps(trainer, tmp_path) if a.detail["dataset_indices"] == [BAD]]
    assert len(bad) == 1


def test_a_batch_that_was_changed_in_place_says_so(tmp_path):
    class Changes(Line):
        def training_step(self, batch, batch_idx):
            loss = super().training_step([batch[0].clone(), batch[1]], batch_idx)
            batch[0][:, 1:] = 0
            return loss

    trainer = fit(tmp_path, [BadBatchDumper()], module=Changes())
    ((_, dump),) = dumps(trainer, tmp_path)
    assert dump.manifest["changed_in_place"] is True


def test_the_disk_budget_is_kept_and_said_once(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper(max_mb=0)])
    store = TrainerStateStore.of(trainer)
    assert not (tmp_path / "spike" / "batches").exists()
    assert len([r for r in store.remarks if "max_mb" in r]) == 1
    assert [f.detail["dataset_indices"][0] for f in store.findings if f.kind == "suspect_samples"] == [BAD]


class Alarmed(BadBatchDumper):
    """Takes every tenth batch for the onset of a spike."""

    def act(self, batch, changed):
        at = batch.at
        if at.ordinal % 10 == 9:
            changed = [Episode(id=at.ordinal, kind=EpisodeKind.SPIKE, onset=at, noticed=at, peak=at)]
        super().act(batch, changed)


def test_the_number_of_dumps_is_kept_and_said_once(tmp_path):
    trainer = fit(tmp_path, [Alarmed(max_dumps=2, neighbours=0)])
    store = TrainerStateStore.of(trainer)
    assert len(list((tmp_path / "spike" / "batches").iterdir())) == 2
    assert len([r for r in store.remarks if "max_dumps" in r]) == 1


def test_a_folder_that_cannot_be_written_to_costs_the_files_only(tmp_path):
    dumper = BadBatchDumper(dirpath=tmp_path / "here")
    (tmp_path / "here").write_text("a file has come in the way")
    trainer = fit(tmp_path, [dumper])
    store = TrainerStateStore.of(trainer)
    assert store.disabled == []
    assert any("could not write" in remark for remark in store.remarks)
    assert [f.kind for f in store.findings] == ["suspect_samples", "suspect_batches"]


def test_a_healthy_run_writes_nothing(tmp_path):
    loader = DataLoader(Noisy(lambda x: x), batch_size=BATCH)
    trainer = fit(tmp_path, [BadBatchDumper()], loader)
    assert not (tmp_path / "spike").exists()
    assert TrainerStateStore.of(trainer).actions == []


def test_a_second_fit_writes_its_own(tmp_path):
    dumper = BadBatchDumper()
    fit(tmp_path / "1", [dumper])
    assert_names_the_bad_one(fit(tmp_path / "2", [dumper]), tmp_path / "2")


@pytest.mark.parametrize("task", ["cnn", "accumulation", "two_by_hand"])
def test_training_is_not_changed_by_a_dump(task, tmp_path, monkeypatch):
    """The dump is forced on a training that has dropout, BatchNorm and torch's own random numbers.

    Every tenth batch is called an onset.
    """

    def weights(callbacks):
        module, options = build(task)
        trainer = train(module, callbacks, tmp_path, max_epochs=1, **options)
        return trainer, [p.detach().clone() for p in module.state_dict().values()], torch.rand(3)

    _, plain, plain_next = weights([])
    trainer, dumped, dumped_next = weights([Alarmed()])
    assert len([a for a in TrainerStateStore.of(trainer).actions if a.detail["role"] == "onset"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, dumped, strict=True))
    assert torch.equal(plain_next, dumped_next)


def test_the_convention_can_be_overridden(tmp_path):
    trainer = fit(tmp_path, [BadBatchDumper(target="0", weight="1")])
    signals = TrainerStateStore.of(trainer).history.signals
    assert {"batch/target/std", "batch/weight/std"} <= set(signals)
    assert not any(s.startswith("batch/input") for s in signals)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_mb": -1},
        {"max_mb": "1"},
        {"max_dumps": -1},
        {"neighbours": 1.5},
        {"target": ""},
        {"weight": 3},
        {"dirpath": 7},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        BadBatchDumper(**wrong)


@pytest.mark.ddp
def test_two_ranks_name_their_own_samples(tmp_path):
    """Lightning puts in its DistributedSampler.

    Every batch of both ranks is checked, and the dump of the rank that had the corrupt sample. Losses of single samples
    are not computed under several ranks, so the values
    must tell: the corrupt ones are beyond the indices that are in the input too.
    """
    script = tmp_path / "train.py"
    script.write_text(
        dedent(
            f"""
            import json, sys, torch
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            sys.path.insert(0, {str(Path(__file__).parents[1])!r})
            from test_bad_batch_dumper import BATCH, SIZE, Line, Noisy
            from lightning.pytorch import Trainer, seed_everything
            from torch.utils.data import DataLoader, DistributedSampler
            from lightning_spike.callbacks.bad_batch_dumper import BadBatchDumper
            from lightning_spike.store import TrainerStateStore

            class Checks(BadBatchDumper):
                seen = 0
                def sense_outcome(self, batch, outputs):
                    told = self._ring.entry(batch.at.ordinal).ids.indices
                    assert list(told) == batch.batch[0][:, 0].int().tolist(), told
                    self.seen += 1

            torch.set_num_threads(1)
            seed_everything(0, verbose=False)
            checks = Checks(dirpath={str(tmp_path)!r})
            # Lightning's own sampler will draw the same: the corrupt sample comes to rank 1 once its loss has settled.
            bad = list(DistributedSampler(Noisy(size=2 * SIZE), num_replicas=2, rank=1, seed=0))[350]
            trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                              gradient_clip_val=1.0,
                              enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                              callbacks=[checks])
            trainer.fit(Line(), DataLoader(Noisy(lambda x: x * 1e5, 2 * SIZE, bad), batch_size=BATCH, shuffle=True))
            store = TrainerStateStore.of(trainer)
            told = {{"seen": checks.seen, "bad": bad, "disabled": [d.reason for d in store.disabled],
                    "dumps": [a.detail for a in store.actions if a.detail["role"] == "onset"]}}
            open({str(tmp_path)!r} + f"/rank{{trainer.global_rank}}.json", "w").write(json.dumps(told))
            """
        )
    )
    subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(script)], cwd=tmp_path, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank, of_rank in enumerate(told):
        assert (of_rank["seen"], of_rank["disabled"]) == (60, [])
        for detail in of_rank["dumps"]:
            assert detail["path"].endswith(f"_rank{rank}")
            dump = load_dump(tmp_path / detail["path"])
            assert dump.batch[0][:, 0].int().tolist() == detail["dataset_indices"]
    (detail,) = told[1]["dumps"]
    assert detail["suspects"][0]["dataset_index"] == told[1]["bad"]
