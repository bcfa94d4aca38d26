"""A scene on disk: a folder with everything that an examination needs, and the way back in another process.

```
episode_0001/
    manifest.json         what a reader checks first: the run, the module and its tensors, the optimizers, versions
    structure.json        the scene, and the present state of module and optimizers, with the tensors by name
    tensors.safetensors   the tensors, each content once
```
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spike.actions.dump_facts import package_versions
from lightning_spike.errors import CannotReplay, ConfigurationError
from lightning_spike.files import whole_folder
from lightning_spike.lab.encoding import Decoder, Encoder, class_name, script_folder
from lightning_spike.lab.scene import Scene
from lightning_spike.record.attribute_state import AttributeState, Untouched, copy_attributes, load_attributes
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.sample_ids import LoaderIds, SampleIds
from lightning_spike.record.snapshot import Snapshot
from lightning_spike.record.state_copy import copy_optimizer, copy_scaler, load_module, load_optimizer, load_scaler
from lightning_spike.records import RunFacts

FORMAT: Final = "lightning_spike.scene"
FORMAT_VERSION: Final = 1
"""Version of the format, by definition."""
MANIFEST: Final = "manifest.json"
STRUCTURE: Final = "structure.json"
TENSORS: Final = "tensors.safetensors"
LIVE: Final = frozenset({"trainer", "module"})
"""Fields of a scene that the reader brings along."""
CONFIG: Final = (
    "Give the config that the run was started with (config.yaml in its log_dir), without overrides that change the "
    "module."
)


def write_scene(folder: Path, scene: Scene, run: RunFacts, *, limit: float = math.inf) -> int:
    """Write a scene, whole or not at all; one that is there already is replaced.

    Nothing of the training is changed. Blocks: tensors are copied to the host, and the files are synced to the disk.

    Args:
        folder: The folder to make; its parents are made where missing.
        scene: As it was made live, between two batches.
        run: The settings of the run.
        limit: Bytes of tensors allowed.

    Returns:
        Bytes written.

    Raises:
        CannotReplay: Something in it cannot be written so that it comes back, or (`TooLarge`) it takes more than the
            limit; the message says what.
        OSError: It could not be written.
    """
    encoder = Encoder(limit)
    if scene.module.device.type == "cuda":
        torch.cuda.synchronize(scene.module.device)  # copies into pinned memory may be under way
    structure = {
        "scene": {f.name: encoder.encode(_plain(getattr(scene, f.name)), f.name) for f in _fields()},
        "present": encoder.encode(_present(scene.trainer, scene.module), "present"),
    }
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **_facts(scene, run, encoder.nbytes)}
    with whole_folder(folder) as hidden:
        save_file(encoder.tensors, hidden / TENSORS)
        (hidden / STRUCTURE).write_text(json.dumps(structure, allow_nan=False), encoding="utf-8")
        (hidden / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str), encoding="utf-8")
        return sum(file.stat().st_size for file in hidden.iterdir())


def find_scenes(folder: Path) -> list[Path]:
    """The scenes in a folder, in order of their names."""
    return sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a scene.

    Raises:
        ConfigurationError: There is no scene, it is broken, or of a version that this package does not read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["format_version"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ConfigurationError.of(
            str(folder),
            expected=f"a scene of version {FORMAT_VERSION}",
            given=found,
            do="Read it with the lightning_spike that wrote it.",
        )
    return dict(manifest)


def read_scene(folder: Path, trainer: Trainer, module: LightningModule) -> Scene:
    """Read a scene, and put trainer and module into the state that they were in when it was written.

    Weights, buffers, optimizer states and the module's own attributes (with its modes, and which parameters are frozen)
    are put back. Blocks.

    Args:
        folder: Where it is.
        trainer: In a fit of a single process, with its optimizers set up.
        module: Made as it was in the run.

    Raises:
        ConfigurationError: There is no scene, it is broken, or the module or its optimizers are not those that it is
            of.
        CannotReplay: A class that it needs cannot be imported here.
    """
    manifest = read_manifest(folder)
    _check_module(manifest, module)
    _check_optimizers(manifest, trainer)
    device = trainer.strategy.root_device
    try:
        structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
        decoder = Decoder(
            load_file(folder / TENSORS), device, host_too=manifest["device"] == "cpu" and device.type != "cpu"
        )
        fields = {name: decoder.decode(node) for name, node in structure["scene"].items()}
        present = decoder.decode(structure["present"])
    except CannotReplay:
        raise
    except Exception as error:  # a file cut short or changed by hand can break in any way
        raise _unreadable(folder, error) from error
    _put_into(trainer, module, present)
    known = {f.name for f in _fields()}
    return Scene(trainer=trainer, module=module, **{name: value for name, value in fields.items() if name in known})


# -- writing -----------------------------------------------------------------------------------------------------------


def _fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(Scene) if f.name not in LIVE]


def _plain(value: Any) -> Any:
    """A field for writing: entries without their dataset, the snapshot's writable part, mappings as plain dicts."""
    if isinstance(value, tuple):
        return tuple(dataclasses.replace(e, ids=_indices(e.ids)) if isinstance(e, RingEntry) else e for e in value)
    if isinstance(value, Snapshot):
        return value if value.own is None else dataclasses.replace(value, own=_writable(value.own))
    return dict(value) if isinstance(value, Mapping) else value


def _indices(ids: SampleIds | None) -> SampleIds | None:
    """Dataset indices of the samples, if they are plain numbers or names."""
    if ids is None:
        return None
    loaders = [LoaderIds(loader=loader.loader, drawn=loader.indices, dataset=None) for loader in ids.loaders]
    is_plain = all(isinstance(index, (int, str)) for loader in loaders for index in loader.drawn)
    return SampleIds(loaders=tuple(loaders)) if is_plain else None


def _present(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The state of module and optimizers as the examination finds it, and goes back to."""
    return {
        "weights": {name: tensor.detach() for name, tensor in _named_tensors(module).items()},
        "optimizers": [copy_optimizer(optimizer, to_host=True) for optimizer in trainer.optimizers],
        "scaler": copy_scaler(trainer),
        "own": _writable(copy_attributes(module)),
    }


def _writable(own: AttributeState) -> AttributeState:
    """A copy without attributes that cannot be written: objects of classes that no other process can import."""
    attributes, left_out = {}, list(own.left_out)
    for part, values in own.attributes.items():
        unwritable = [name for name, value in values.items() if not _can_be_written(value)]
        attributes[part] = values | dict.fromkeys(unwritable, Untouched.UNTOUCHED)
        left_out += [f"{part}.{name}".lstrip(".") for name in unwritable]
    return dataclasses.replace(own, attributes=attributes, left_out=tuple(left_out))


def _can_be_written(value: object) -> bool:
    try:
        Encoder().encode(value, "attribute")
    except CannotReplay:
        return False
    return True


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in named if not is_lazy(tensor)}


def _facts(scene: Scene, run: RunFacts, nbytes: int) -> dict[str, Any]:
    datamodule = getattr(scene.trainer, "datamodule", None)
    return {
        "lightning_spike": importlib.import_module("lightning_spike").__version__,
        "versions": package_versions(),
        "run": dataclasses.asdict(run),
        "device": scene.module.device.type,
        "episode": dataclasses.asdict(scene.episode) | {"loss_before": None, "loss_peak": None},
        "batches": len(scene.entries),
        "tensor_bytes": nbytes,
        "module": class_name(type(scene.module), "the module"),
        "datamodule": None if datamodule is None else class_name(type(datamodule), "the data module"),
        "script_folder": script_folder(),
        "shapes": {name: list(tensor.shape) for name, tensor in _named_tensors(scene.module).items()},
        "optimizers": [_optimizer(optimizer) for optimizer in scene.trainer.optimizers],
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "class": type(optimizer).__name__,
        "parameters": [len(group["params"]) for group in optimizer.param_groups],
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def _check_module(manifest: Mapping[str, Any], module: LightningModule) -> None:
    wanted = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    found = {name: tuple(tensor.shape) for name, tensor in _named_tensors(module).items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise ConfigurationError.of(
                "replay(model)",
                expected=f"the {manifest['module']} of the run, with {_in_words(name, wanted.get(name))}",
                given=f"a {type(module).__name__} with {_in_words(name, found.get(name))}",
                do=CONFIG,
            )


def _check_optimizers(manifest: Mapping[str, Any], trainer: Trainer) -> None:
    found = [_optimizer(optimizer) for optimizer in trainer.optimizers]
    if found != manifest["optimizers"]:
        raise ConfigurationError.of(
            "replay(optimizers)",
            expected=f"those of the run, {_optimizers_in_words(manifest['optimizers'])}",
            given=_optimizers_in_words(found),
            do=f"{CONFIG} Parameter groups that a callback added during the run cannot be made again.",
        )


def _put_into(trainer: Trainer, module: LightningModule, present: Mapping[str, Any]) -> None:
    load_module(module, present["weights"])
    for optimizer, saved in zip(trainer.optimizers, present["optimizers"], strict=True):
        load_optimizer(optimizer, saved, hyperparameters=True)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # it makes its tensors when it first scales a loss
    if present["scaler"] is not None and scaler is not None and scaler._scale is None:
        scaler._lazy_init_scale_growth_tracker(trainer.strategy.root_device)
    load_scaler(trainer, present["scaler"])
    load_attributes(module, present["own"])


def _in_words(name: str, shape: tuple[int, ...] | None) -> str:
    return f"no {name}" if shape is None else f"{name} of shape {shape}"


def _optimizers_in_words(optimizers: list[dict[str, Any]]) -> str:
    each = [f"{o['class']} over {' + '.join(map(str, o['parameters']))} parameters" for o in optimizers]
    return ", ".join(each) or "none"


def _unreadable(folder: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError.of(
        str(folder),
        expected="a whole scene that SceneRecorder wrote",
        given=f"{type(error).__name__}: {error}",
        do="Take it from the run's folder again.",
    )
