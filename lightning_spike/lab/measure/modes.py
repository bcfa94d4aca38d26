"""An ordinary batch in train and in eval mode: running statistics that do not fit the weights, a forgotten train mode."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

from torch import Tensor

from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of

TOLD: Final = 4
"""Modules in eval mode that are named."""
CHANGED: Final = 2.0
"""Factor by which the ratio of the losses in the two modes must have changed to be told; an engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModeMeasures:
    """The losses of one ordinary batch."""

    train: float
    """As the training runs it, under the weights at the onset."""
    eval: float
    """In eval mode, under the same."""
    usual_train: float | None
    """As the training ran it, under the snapshot's weights; `None`, as the next one, where the modes make no difference at the onset: nothing else is asked then."""
    usual_eval: float | None
    frozen: tuple[str, ...]
    """Modules that are in eval mode in the training though the whole is not, the outermost ones; `("",)` where all of it is."""
    text: str


def measure_modes(
    sandbox: Sandbox, entry: RingEntry, *, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> ModeMeasures | None:
    """Four forward passes, two where the modes make no difference; `None` where a step gives no loss.

    Args:
        sandbox: Inside `isolated`.
        entry: An ordinary batch.
        old: Weights and buffers from before.
        new: Those at the onset.
    """
    now = [_loss(sandbox, new, entry, in_eval=in_eval) for in_eval in (False, True)]
    differ = now[0] != now[1]
    then = [_loss(sandbox, old, entry, in_eval=in_eval) for in_eval in (False, True)] if differ else [None, None]
    if now[0] is None or now[1] is None:
        return None
    sandbox.rewind()
    found = ModeMeasures(
        train=now[0], eval=now[1], usual_train=then[0], usual_eval=then[1], frozen=_frozen(sandbox), text=""
    )
    return dataclasses.replace(found, text=_text(found))


def _loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, in_eval: bool) -> float | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    if in_eval:
        sandbox.module.eval()
    loss = loss_of(sandbox.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at))
    return None if loss is None else float(sandbox.ranks.mean("a loss", [float(loss.detach())])[0])


def _frozen(sandbox: Sandbox) -> tuple[str, ...]:
    resting = [name for name, part in sandbox.module.named_modules() if not part.training]
    outermost = [n for n in resting if not any(o != n and (not o or n.startswith(f"{o}.")) for o in resting)]
    return tuple(outermost)


def _text(found: ModeMeasures) -> str:
    losses = f"An ordinary batch has a loss of {found.train:.3g} in train mode and of {found.eval:.3g} in eval mode"
    train, in_eval = found.usual_train, found.usual_eval
    if train is None or in_eval is None:
        parts = [f"{losses}: no difference."]
    else:
        before = _ratio(in_eval, train)
        times = _ratio(found.eval, found.train) / before if before > 0 else 1.0
        parts = [f"{losses} (before: {train:.3g} and {in_eval:.3g}).", *_changed(times)]
    if found.frozen == ("",):
        parts.append("The whole module is in eval mode during training.")
    elif found.frozen:
        names = ", ".join(f"'{name}'" for name in found.frozen[:TOLD])
        parts.append(f"In eval mode during training: {names}{' and others' if len(found.frozen) > TOLD else ''}.")
    return " ".join(parts)


def _changed(times: float) -> list[str]:
    """Where the ratio of the losses is another one now."""
    if times >= CHANGED:
        return ["Eval mode has become worse than train mode: running statistics do not fit the weights any more."]
    if times <= 1 / CHANGED:
        return [
            "Train mode has become worse than eval mode: it is what only train mode does (dropout, batch statistics)."
        ]
    return []


def _ratio(a: float, b: float) -> float:
    """1 where it means nothing: a loss that is not positive."""
    if math.isfinite(a) and math.isfinite(b):
        return a / b if a > 0 and b > 0 else 1.0
    return 1.0 if math.isfinite(a) == math.isfinite(b) else math.inf if math.isfinite(b) else 0.0
