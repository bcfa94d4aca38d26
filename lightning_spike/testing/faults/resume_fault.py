"""State that is missing or starts over after a resume."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.testing.batch_edit import some_items
from lightning_spike.testing.fault import Needs, OneOffFault, Scale


class _ResumeFault(OneOffFault):
    """Base of the faults that remove state from the checkpoint after Lightning has read it; the file is unchanged.

    It acts in every fit with a `ckpt_path`; `at` is part of the description only. A fit that is not resumed raises at
    the batch `at`.
    """

    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.RESUME})
    _resumed: bool = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._resumed = False

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._resumed = True
        self.lose(checkpoint)

    def lose(self, checkpoint: dict[str, Any]) -> None:
        """Removes the lost state from the checkpoint."""
        raise NotImplementedError

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        self.require(self._resumed, Needs.RESUME, None)
        return batch

    def _some_states(self, checkpoint: dict[str, Any]) -> list[tuple[dict[Any, Any], Any]]:
        """For a share of each optimizer's parameters, the optimizer's states and the parameter's key."""
        states = [saved["state"] for saved in checkpoint["optimizer_states"]]
        return [(state, key) for state in states for key in some_items(list(state), self.strength, self.seed)]


class ResumeLosesOptimizerState(_ResumeFault):
    """A resume that restores the weights and not the optimizer: momenta and second moments begin again at 0.

    Args:
        at: The batch that the run is resumed at: batches begun in the whole run before it.
        strength: Share of the parameters whose state is lost, at least one.
        seed: Of the choice of parameters.
    """

    cause = "resume_fault"
    SCALE: ClassVar[Scale] = Scale(means="the share of the parameters whose state is lost", above=0, at_most=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.5}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0}

    @override
    def lose(self, checkpoint: dict[str, Any]) -> None:
        for states, key in self._some_states(checkpoint):
            del states[key]


class ResumeLosesMoments(_ResumeFault):
    """A resume that restores momenta and step counts but not Adam's second moments: a missing kind of shard.

    v_t begins at 0 while the step count says that it is old, so that it is not corrected for that: updates are up to `1
    / sqrt(1 - beta2)`, some 30 times, too large (Kingma and Ba 2015, "Adam", section 3).

    Args:
        at: The batch that the run is resumed at: batches begun in the whole run before it.
        strength: Share of the parameters whose second moments are lost, at least one.
        seed: Of the choice of parameters.
    """

    cause = "resume_fault"
    SCALE: ClassVar[Scale] = Scale(
        means="the share of the parameters whose second moments are lost", above=0, at_most=1
    )
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 0.3}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 1.0}
    NEEDS: ClassVar[frozenset[Needs]] = frozenset({Needs.RESUME, Needs.ADAM})

    @override
    def lose(self, checkpoint: dict[str, Any]) -> None:
        states = [states[key] for states, key in self._some_states(checkpoint)]
        self.require(any("exp_avg_sq" in s for s in states), Needs.ADAM, [sorted(state) for state in states[:1]])
        for state in states:
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])


class ResumeRestartsSchedule(_ResumeFault):
    """A resume that does not restore the schedule: it begins again, at its first rate.

    Args:
        at: The batch that the run is resumed at: batches begun in the whole run before it.
        strength: Factor on the first rate. In a run without a schedule 1 changes nothing.
        seed: Not used; nothing is drawn.
    """

    cause = "resume_fault"
    SCALE: ClassVar[Scale] = Scale(means="the factor on the schedule's first rate", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 2.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 10.0}

    @override
    def lose(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []
        for saved in checkpoint["optimizer_states"]:
            for group in saved["param_groups"]:
                group["lr"] = group.get("initial_lr", group["lr"]) * self.strength
