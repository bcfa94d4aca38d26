"""A cut of the learning rate that is independent of the schedule."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LearningRateCut:
    """Multiplies the learning rate of every parameter group by `factor` for the duration of `optimizer.step()`.

    Schedulers and user code read and write the planned rate. `on_before_optimizer_step` reads the cut rate, or under
    fp16 with a GradScaler, where that hook precedes the step, the planned one.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._handles: list[RemovableHandle] = []
        self._planned: dict[int, list[Any]] = {}

    def install(self, optimizers: Iterable[Optimizer]) -> None:
        """Apply `factor` from the next step on; does nothing at a factor of 1 or if installed."""
        if self.factor == 1.0 or self._handles:
            return
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._cut))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _cut(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._restore(optimizer, args, kwargs)  # after a step that raised
        self._planned[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, args: object, kwargs: object) -> None:  # noqa: ARG002 - torch's signature
        for group, planned in zip(optimizer.param_groups, self._planned.pop(id(optimizer), []), strict=False):
            group["lr"] = planned
