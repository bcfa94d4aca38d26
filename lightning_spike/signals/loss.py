"""The training loss of a batch, from whatever `training_step` returned."""

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

BACKWARD: Final = "loss/backward"
"""Under manual optimisation, the losses of several backward passes of one batch: this and their place, from 0."""


def batch_losses(outputs: object, backward: Sequence[Tensor], *, divided_by: int = 1) -> dict[str, Tensor]:
    """The returned loss, else what manual backward passes were called with; a single one of those is the loss.

    Args:
        outputs: As in `training_losses`.
        backward: What the batch's backward passes were called with, in order, each with one element; empty under
            automatic optimisation.
        divided_by: As in `training_losses`.

    Returns:
        By signal name, as in `training_losses`, with `"loss/backward0"` and so on for several backward passes.
    """
    losses = training_losses(outputs, divided_by=divided_by)
    if "loss" not in losses:
        single = len(backward) == 1
        losses |= {"loss" if single else f"{BACKWARD}{place}": loss for place, loss in enumerate(backward)}
    return losses


def total_loss(named: Mapping[str, float]) -> float | None:
    """One number for a batch.

    Its loss, or where it has several backward passes instead, the sum of theirs; `None` where there is neither.
    """
    if "loss" in named:
        return named["loss"]
    parts = [value for name, value in named.items() if name.startswith(BACKWARD)]
    return sum(parts) if parts else None


def training_losses(outputs: object, *, divided_by: int = 1) -> dict[str, Tensor]:
    """Find the losses in what Lightning hands to `on_train_batch_end`.

    Args:
        outputs: A tensor with one element, a mapping, or `None`; anything else has no loss.
        divided_by: Lightning divides `outputs["loss"]` by `accumulate_grad_batches` under automatic optimisation; the
            loss is multiplied back by this.

    Returns:
        Tensors with one element, detached, on their own device, by signal name: `"loss"` for the loss itself,
        `"loss/<key>"` for any other one-element tensor of the mapping whose key holds "loss". Empty where the step
        returned none. Never blocks.
    """
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach() * divided_by} if outputs.numel() == 1 else {}
    if not isinstance(outputs, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    for key, value in outputs.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.numel() != 1:
            continue
        if key == "loss":
            found["loss"] = value.detach() * divided_by
        elif "loss" in key.lower():
            found[f"loss/{key}"] = value.detach()
    return found
