"""Copy and restore weights, gradients, optimizers, loss scaler and averaged models.

DDP, compiled graphs and optimizers hold references to the live tensors, so loading writes into them and never replaces
them. A copy never shares memory with a live tensor, so it can be loaded any number of times.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_spike.record.mixed_precision import scaler_of

SCHEDULED: Final = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "betas", "weight_decay"}) | {
    "momentum",
    "base_momentum",
    "max_momentum",
}
"""Entries of a parameter group that schedulers write (torch.optim.lr_scheduler and swa_utils; weight decay by users'
own). They stay as they are, as the schedule is not rewound. Other entries (Prodigy's `d`, a step count) are state."""


def copy_module(module: nn.Module, *, to_host: bool = False) -> dict[str, Tensor]:
    """Copy all parameters and buffers by name, non-persistent buffers included.

    Args:
        module: The module to copy.
        to_host: Copy CUDA tensors into pinned host memory, without waiting for the copy.
    """
    live = dict(_named_tensors(module))
    return dict(zip(live, _copy_all(list(live.values()), to_host=to_host), strict=True))


def load_module(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Write the copies into the live parameters and buffers; tensors without a copy keep their values."""
    with torch.no_grad():
        for name, tensor in _named_tensors(module):
            if name in saved:
                tensor.copy_(saved[name], non_blocking=True)


def copy_gradients(module: nn.Module, *, to_host: bool = False) -> dict[str, Tensor]:
    """Copy the gradients by parameter name; under manual optimisation they can be unfinished sums."""
    live = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return dict(zip(live, _copy_all(list(live.values()), to_host=to_host), strict=True))


def load_gradients(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Set the gradients to clones of these, and to `None` for parameters without one."""
    for name, parameter in module.named_parameters():
        parameter.grad = saved[name].to(parameter.device, copy=True) if name in saved else None


def copy_optimizer(optimizer: Optimizer, *, to_host: bool = False) -> dict[str, Any]:
    """Copy state and parameter groups in the form of `optimizer.state_dict()`, without hooks and collectives."""
    index = {parameter: i for i, parameter in enumerate(_parameters(optimizer))}
    state = {index[p]: dict(entry) for p, entry in optimizer.state.items() if p in index}
    places = [(entry, key) for entry in state.values() for key, value in entry.items() if isinstance(value, Tensor)]
    for entry in state.values():
        nested = {key: _copy_tree(v, to_host=to_host) for key, v in entry.items() if isinstance(v, (dict, list, tuple))}
        entry.update(nested)
    for (entry, key), copied in zip(places, _copy_all([e[k] for e, k in places], to_host=to_host), strict=True):
        entry[key] = copied
    groups = [
        {key: _copy_tree(value, to_host=False) for key, value in group.items() if key != "params"}
        | {"params": [index[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], *, hyperparameters: bool = False) -> None:
    """Restore an optimizer in place.

    Removes state that was added since. `SCHEDULED` entries stay as they are, unless `hyperparameters` is true. A
    parameter group that was added since keeps its settings and loses its state.
    """
    with torch.no_grad():
        for index, parameter in enumerate(_parameters(optimizer)):
            if index in saved["state"]:
                _load_entry(optimizer.state[parameter], saved["state"][index], parameter.device)
            else:
                optimizer.state.pop(parameter, None)
        for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=False):
            for key, value in old.items():
                if key != "params" and (hyperparameters or key not in SCHEDULED):
                    group[key] = _loaded(group.get(key), value, torch.device("cpu"))


def copy_scaler(trainer: Trainer) -> dict[str, Tensor | None] | None:
    """Copy the loss scale and its growth count; `None` without a GradScaler.

    Its own `state_dict` waits for the device. These are device tensors, or `None` until it has scaled a loss.
    """
    scaler = scaler_of(trainer)
    if scaler is None:
        return None
    held = {"scale": scaler._scale, "growth_tracker": scaler._growth_tracker}  # see above
    return {name: None if tensor is None else _copy(tensor, to_host=False) for name, tensor in held.items()}


def load_scaler(trainer: Trainer, saved: Mapping[str, Tensor | None] | None) -> None:
    """Restore the loss scale; a copy from before its first use restores the initial value."""
    scaler = scaler_of(trainer)
    if scaler is None or saved is None:
        return
    live_scale, live_tracker = scaler._scale, scaler._growth_tracker  # as in copy_scaler
    if live_scale is None or live_tracker is None:
        return
    scale, tracker = saved["scale"], saved["growth_tracker"]
    if scale is None or tracker is None:
        live_scale.fill_(scaler._init_scale)
        live_tracker.fill_(scaler._init_growth_tracker)
    else:
        live_scale.copy_(scale)
        live_tracker.copy_(tracker)


def copy_averages(trainer: Trainer, module: LightningModule, *, to_host: bool = False) -> dict[str, dict[str, Tensor]]:
    """Copy the averaged models (EMA, SWA) of the trainer's callbacks, which one bad update spoils for good."""
    return {name: copy_module(held, to_host=to_host) for name, held in _averages(trainer, module)}


def load_averages(trainer: Trainer, module: LightningModule, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Restore the averaged models."""
    for name, held in _averages(trainer, module):
        if name in saved:
            load_module(held, saved[name])


def tensors_in(*trees: object) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    return [leaf for leaf in pytree.tree_leaves(list(trees)) if isinstance(leaf, Tensor)]


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that can be written in place: not lazy ones, not expanded ones."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not is_lazy(tensor) and not _overlaps(tensor):
            yield name, tensor


def _overlaps(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _copy(tensor: Tensor, *, to_host: bool) -> Tensor:
    with torch.no_grad():
        live = tensor.detach()
        if not (to_host and live.is_cuda):
            return live.clone()
        host = torch.empty_like(live, device="cpu", pin_memory=True)
        host.copy_(live, non_blocking=True)
        return host


def _copy_all(tensors: Sequence[Tensor], *, to_host: bool) -> list[Tensor]:
    """Copy all tensors, with one kernel per device and dtype."""
    copies: list[Tensor | None] = [None] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if (
            (to_host and tensor.is_cuda)
            or type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout is not torch.strided
        ):
            copies[place] = _copy(tensor, to_host=to_host)
        else:
            groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    with torch.no_grad():
        for places in groups.values():
            live = [tensors[place].detach() for place in places]
            clones = [torch.empty_like(tensor) for tensor in live]
            torch._foreach_copy_(clones, live)
            for place, clone in zip(places, clones, strict=True):
                copies[place] = clone
    return [copy for copy in copies if copy is not None]


def _copy_tree(tree: Any, *, to_host: bool) -> Any:
    return pytree.tree_map(lambda leaf: _copy(leaf, to_host=to_host) if isinstance(leaf, Tensor) else leaf, tree)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _load_entry(live: dict[str, Any], saved: Mapping[str, Any], device: torch.device) -> None:
    for key in [key for key in live if key not in saved]:
        del live[key]
    for key, value in saved.items():
        live[key] = _loaded(live.get(key), value, device)


def _loaded(live: Any, saved: Any, device: torch.device) -> Any:
    """The live tensor with the saved values, where shape and dtype fit; else a copy on the given device."""
    if not isinstance(saved, Tensor):
        return pytree.tree_map(lambda leaf: _loaded(None, leaf, device) if isinstance(leaf, Tensor) else leaf, saved)
    if isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
        return live.copy_(saved, non_blocking=True)
    pinned = saved.device.type == "cpu" and device.type == "cuda" and saved.is_pinned()
    return saved.to(device, non_blocking=True) if pinned else saved.clone()


def _averages(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, nn.Module]]:
    # Lightning sets it without declaring it
    callbacks: list[object] = list(trainer.callbacks)  # type: ignore[attr-defined]
    for place, callback in enumerate(callbacks):
        for name, held in vars(callback).items():
            if isinstance(held, nn.Module) and held is not module:
                yield f"{place}.{name}", held
