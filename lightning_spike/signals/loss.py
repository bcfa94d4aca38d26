"""Training losses of a batch, from the output of `training_step`."""

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

BACKWARD: Final = "loss/backward"
"""Signal of several backward passes under manual optimisation, followed by their index."""


def batch_losses(outputs: object, backward: Sequence[Tensor], *, divided_by: int = 1) -> dict[str, Tensor]:
    """The returned losses, or those of manual backward passes; a single one is `"loss"`.

    Args:
        outputs: As in `training_losses`.
        backward: Losses of the batch's backward passes in order; empty under automatic optimisation.
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
    """The loss of a batch, or the sum over its backward passes; `None` without either."""
    if "loss" in named:
        return named["loss"]
    parts = [value for name, value in named.items() if name.startswith(BACKWARD)]
    return sum(parts) if parts else None


def training_losses(outputs: object, *, divided_by: int = 1) -> dict[str, Tensor]:
    """Find the losses in the outputs of `on_train_batch_end`.

    Args:
        outputs: A tensor with one element, a mapping, or anything else for no loss.
        divided_by: Multiplies the loss, which Lightning divides by `accumulate_grad_batches` under automatic
            optimisation.

    Returns:
        Detached tensors with one element by signal name: `"loss"`, and `"loss/<key>"` for other tensors of the mapping
        whose key contains "loss". Never blocks.
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
