"""A cut of the learning rate that any schedule leaves in force, because it is applied after the schedule and taken back before it."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LearningRateCut:
    """Multiplies the learning rate of every parameter group by `factor` for the duration of `optimizer.step()`.

    A scheduler, recursive or closed, or a user's own code sees and writes the planned rate as ever: so the plan keeps
    its shape, and the rate in use is the plan times the factor at every step. What `on_before_optimizer_step` reads is
    the rate in use (under fp16 with a GradScaler, where that hook comes before the step, the planned one).
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._handles: list[RemovableHandle] = []
        self._planned: dict[int, list[Any]] = {}

    def install(self, optimizers: Iterable[Optimizer]) -> None:
        """Apply `factor` from the next step on; does nothing at a factor of 1 or where it is installed already."""
        if self.factor == 1.0 or self._handles:
            return
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._cut))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _cut(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._restore(optimizer, args, kwargs)  # a step that raised has left the cut rate behind
        self._planned[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, args: object, kwargs: object) -> None:  # noqa: ARG002 - torch's signature
        for group, planned in zip(optimizer.param_groups, self._planned.pop(id(optimizer), []), strict=False):
            group["lr"] = planned
