"""The training loss of a batch, from whatever `training_step` returned."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["training_losses"]


def training_losses(outputs: object, *, divided_by: int = 1) -> dict[str, Tensor]:
    """Find the losses in what Lightning hands to `on_train_batch_end`.

    Args:
        outputs: A tensor with one element, a mapping, or `None`; anything else has no loss.
        divided_by: Lightning divides `outputs["loss"]` by `accumulate_grad_batches` under automatic optimisation; the loss is multiplied
            back by this.

    Returns:
        Tensors with one element, detached, on their own device, by signal name: `"loss"` for the loss itself, `"loss/<key>"` for any
        other one-element tensor of the mapping whose key holds "loss". Empty where the step returned none. Never blocks.
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
