"""Facts about a batch for the manifest of its dump."""

import dataclasses
import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from lightning_spike.actions.batch_dump import content_hash
from lightning_spike.records import Moment
from lightning_spike.samples.examined_batch import MAX_LISTED_SAMPLES, ExaminedBatch
from lightning_spike.signals.batch import BatchLeaf, value_statistics
from lightning_spike.store import TrainerStateStore

PACKAGES: Final = ("lightning-spike", "lightning", "torch", "torchmetrics", "numpy", "safetensors")


def dump_facts(
    batch: ExaminedBatch, store: TrainerStateStore, *, episode: int, role: str, rank: int, last_of_step: Moment
) -> dict[str, Any]:
    """All facts about a batch, JSON-able. Blocks for a batch on a device.

    Args:
        batch: The batch.
        store: Has the batch's signals.
        episode: Id of the episode.
        role: `"onset"`, `"micro_batch"` (of the same optimizer step) or `"neighbour"`.
        rank: Global rank of this process.
        last_of_step: The last batch of the same optimizer step, which has the gradient norm.
    """
    at = batch.entry.at
    signals = _signals(store, at.ordinal)
    loaders = () if batch.entry.ids is None else batch.entry.ids.loaders
    step_signals = _signals(store, last_of_step.ordinal)
    return {
        **dataclasses.asdict(at),
        "rank": rank,
        "episode": episode,
        "role": role,
        "loss": signals.get("loss"),
        "grad_norm": step_signals.get("grad_norm"),
        "learning_rates": {name: value for name, value in step_signals.items() if name.startswith("lr-")},
        "signals": signals,
        "changed_in_place": batch.entry.mutated,
        "batch_size": batch.size,
        "dataset_indices": _listed(batch.indices),
        "loaders": [{"loader": ids.loader, "dataset_indices": _listed(ids.indices)} for ids in loaders],
        "content_sha256": content_hash(leaf.value for leaf in batch.leaves if leaf.value.layout is torch.strided),
        "leaves": [_leaf_facts(leaf) for leaf in batch.leaves],
        "samples": _samples(batch),
        "suspects": [dataclasses.asdict(suspect) for suspect in batch.suspects],
        "losses_under": batch.weights,
        "versions": package_versions(),
    }


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Versions of Python and of relevant packages; `None` for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _signals(store: TrainerStateStore, ordinal: int) -> dict[str, float]:
    values = {name: store.history.at(name, ordinal) for name in store.history.signals}
    return {name: value for name, value in values.items() if value is not None}


def _listed(indices: tuple[Any, ...]) -> list[Any]:
    return list(indices[:MAX_LISTED_SAMPLES])


def _leaf_facts(leaf: BatchLeaf) -> dict[str, Any]:
    return {
        "name": leaf.name,
        "part": leaf.part.value,
        "path": list(leaf.path),
        "dtype": str(leaf.value.dtype).removeprefix("torch."),
        "shape": list(leaf.value.shape),
        "device": str(leaf.value.device),
        "statistics": {name: float(value) for name, value in value_statistics(leaf.value).items()},
    }


def _samples(batch: ExaminedBatch) -> dict[str, Any]:
    """Columns with one entry per sample."""
    if batch.size is None or batch.size > MAX_LISTED_SAMPLES:
        return {}
    columns: dict[str, Any] = {"loss": batch.losses} if batch.losses is not None else {}
    for name, values in batch.values.items():
        columns |= {f"{name}/max_abs": values.max_abs, f"{name}/std": values.std, f"{name}/nonfinite": values.nonfinite}
    known = len(batch.indices) == batch.size
    return columns | {"dataset_index": _listed(batch.indices) if known else [None] * batch.size}
