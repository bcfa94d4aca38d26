"""Modules that were put into another mode in the run: is the jump gone with the modes of before?"""

from typing import Final

from lightning_spike.errors import CannotReplay
from lightning_spike.lab.experiments.blame import blame_outside
from lightning_spike.lab.experiments.findings import blame_finding, finding
from lightning_spike.lab.experiments.outside import repaired_share
from lightning_spike.lab.experiments.split import not_reproduced
from lightning_spike.lab.replay.reproduce import Reproduction, is_same, reproduce
from lightning_spike.lab.scene import Scene
from lightning_spike.records import Finding
from lightning_spike.sandbox.isolation import Sandbox
from lightning_spike.sandbox.state import TrainState

MOST: Final = 0.5
"""Share of the jump that must be gone with the modes of before."""
NAMED: Final = 4
"""Modules named at most."""


def modes_findings(scene: Scene, replay: Reproduction, sandbox: Sandbox) -> list[Finding]:
    """What the re-run says, which has the modes of the snapshot, where the training's were others: `split`, `outside` and `blame`.

    The way is gone once more, with the modes as they were: only where the recorded losses come out then, and most of the jump is gone with the modes of before, are they to
    blame. Where modes have not changed since the snapshot, or on several ranks, it costs nothing.

    Args:
        scene: The episode.
        replay: Its re-run, which differs.
        sandbox: Inside `isolated(..., with_optimizers=True)`.

    Returns:
        Nothing where the modes did not do it.
    """
    changed = [k for k in scene.modes if scene.snapshot.at.ordinal < k <= scene.target_ordinal]
    repaired = repaired_share(scene, replay)
    if not changed or repaired is None or repaired < MOST or sandbox.trainer.world_size > 1:
        return []
    actual = _as_it_was(scene, sandbox)
    if actual is None or not is_same(actual, scene.recorded):
        return []
    names = scene.modes[changed[-1]]
    step = next((e.at.step for e in scene.entries if e.at.ordinal == changed[-1]), None)
    text = (
        f"From step {step} on {_listed(names)}. Run again with the modes of before the loss is {replay.replayed:.3g}, with those it is {actual:.3g} as in the training: "
        f"without the change {repaired:.0%} of the jump is gone."
    )
    outside = {
        "ordinal": replay.differs_at,
        "step": step,
        "writes": [],
        "different": [],
        "changed": "modes",
        "modes": list(names),
        "with_change": actual,
        "repaired": repaired,
        "text": text,
    }
    blamed = blame_finding(scene, blame_outside("modes"))
    return [finding(scene, "split", not_reproduced(text)), finding(scene, "outside", outside), blamed]


def _as_it_was(scene: Scene, sandbox: Sandbox) -> float | None:
    """The loss of the struck batch with the modes as they were."""
    sandbox.rewind()
    sandbox.modes = scene.modes
    try:
        found = reproduce(sandbox, TrainState.of(scene.snapshot), scene.stretch, scene.settings, scene.losses)
    except CannotReplay:
        return None
    finally:
        sandbox.modes = {}
    return found.replayed if found.reached == scene.target_ordinal else None


def _listed(names: tuple[str, ...]) -> str:
    if "" in names:
        return "the whole module was in eval mode"
    if not names:
        return "all modules were in train mode"
    more = " and others" if len(names) > NAMED else ""
    return f"in eval mode were {', '.join(names[:NAMED])}{more}"
