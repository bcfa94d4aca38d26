"""Experiments by hand: the parts that a test names, everything else ordinary."""

import dataclasses

from lightning_spike.experiments import (
    Attribution,
    Experiments,
    FactorShare,
    FirstNonFinite,
    ModuleActivity,
    ModuleChange,
    ModuleMeasurement,
    OutsideChange,
    OutsideWrite,
    Remedy,
    Replay,
    SampleMeasurement,
    SampleOrder,
    Split,
    StepSize,
    TensorDifference,
    UpdateMeasurement,
)

ORDINARY_STEPS = StepSize(rho=0.95, worsened=0.0, against=0.0, overshot=0.0, updates=40)
EFFECTS = {
    "data": {"data_effect": 1.0},
    "weights": {"weights_effect": 1.0},
    "both": {"data_effect": 0.5, "weights_effect": 0.5},
    "noise": {"noise": 10.0},
    "computation": {"computation_effect": 1.0},
}
BY_UPDATE = ("learning_rate", "optimizer", "clipping", "numerics", "intrinsic", "gradient")
FACTORS = {
    "learning_rate": "learning_rate",
    "optimizer": "optimizer_state",
    "clipping": "clipping",
    "numerics": "precision",
}


def replay(*, exact=True):
    return Replay(batches=8, recorded=4.0, replayed=4.0, differs_at=None, failure=None if exact else "no snapshot")


def split_of(verdict="both", **fields):
    """A split of a jump of 1 that gives it to this."""
    effects = {
        "data_effect": 0.0,
        "weights_effect": 0.0,
        "interaction_effect": 0.0,
        "computation_effect": 0.0,
        "noise": 0.01,
    }
    fixed = {
        "jump": 1.0,
        "weights_error": 0.01,
        "excess": 1.0,
        "controls": 8,
        "batch_loss": (0.3, 4.0),
        "control_loss": (0.3, 0.3),
    }
    return Split(**fixed | effects | EFFECTS.get(verdict, {}) | fields)


def with_shares(**shares):
    """The fields of `Experiments` from which these shares of the jump follow."""
    if "outside" in shares and shares["outside"] > 0:
        return {"replay": replay(), "outside_change": outside("weights")}
    by_update = sum(shares.get(group, 0.0) for group in BY_UPDATE)
    split = split_of(
        data_effect=shares.get("data", 0.0), weights_effect=by_update, computation_effect=shares.get("computation", 0.0)
    )
    found = {"replay": replay(), "split": split, "step_size": ORDINARY_STEPS}
    if by_update > 0:
        found["attribution"] = attribution(
            {g: shares.get(g, 0.0) / by_update for g in FACTORS},
            intrinsic=(shares.get("intrinsic", 0.0) + shares.get("gradient", 0.0)) / by_update,
        )
    if shares.get("gradient", 0.0) > 0:
        found["update"] = update(slope=-1.0, slope_usual=1.0)
    return found


def attribution(shares=None, *, ordinal=199, intrinsic=0.0, finer=None):
    def parts(by_name, group_of):
        return tuple(FactorShare(factor=f, group=group_of(f), share=s, error=0.05) for f, s in by_name.items())

    listed = {FACTORS.get(g, g): s for g, s in (shares or {}).items() if s}
    groups = {factor: group for group, factor in FACTORS.items()} | {"epsilon": "optimizer"}
    return Attribution(
        ordinal=ordinal, step=ordinal, updates=1, damage=1.0, shares=parts(listed, lambda f: groups.get(f, "data")),
        finer=parts(finer or {}, lambda _: "optimizer"), odd_batch=True, intrinsic=intrinsic, at_baseline=("clipping",),
    )  # fmt: skip


def outside(kind, *, repaired=0.98, writes=(), different=(), modules=None):
    return OutsideChange(
        ordinal=199, step=199, kind=kind, repaired=repaired, eval_modules=modules, loss_with_change=4.0,
        writes=tuple(OutsideWrite(ordinal=199, kind=k, names=("net.0.weight",)) for k in writes),
        different=tuple(
            TensorDifference(
                name="net.0.weight", kind="weights", relative=0.5, elements=of, changed=changed, powers_of_two=powers
            )
            for changed, of, powers in different
        ),
    )  # fmt: skip


def born(phase, *, module=None, operation=None, healthy=True):
    return FirstNonFinite(phase=phase, module=module, operation=operation, with_healthy_weights=healthy)


def modules(**factors):
    """Modules, by name, with the factor by which the size of their outputs (or as a pair also the gradient) changed."""

    def activity(size, gradient):
        return ModuleActivity(largest=size, rms=size, zeros=0.0, saturated=None, gradient=gradient)

    def change(name, given):
        factor, kind, gradient = (*given, None)[:3] if isinstance(given, tuple) else (given, "Linear", 1.0)
        gradient = 1.0 if gradient is None else gradient
        most = max(factor, 1 / factor, gradient, 1 / gradient)
        return ModuleChange(
            module=name, kind=kind, now=activity(2.0 * factor, gradient), usual=activity(2.0, 1.0), factor=most
        )

    return ModuleMeasurement(modules=tuple(change(name.replace("__", "."), given) for name, given in factors.items()))


def update(**fields):
    ordinary = {
        "ordinal": 199, "step": 199, "tensor": "net.0.weight", "rms": 1.0, "rms_usual": 1.0, "cosine": 0.1,
        "cosine_usual": 0.1,
        "length": 0.1, "relative_length": 0.001, "length_usual": 0.1, "promised": -0.1, "rho": 0.9, "slope": None,
        "slope_usual": None, "against": None, "against_error": None,
    }  # fmt: skip
    return UpdateMeasurement(**ordinary | fields)


def samples(losses, usual):
    count = min(len(losses), 3)
    return SampleMeasurement(
        losses=tuple(losses), usual_losses=tuple(usual), gradient_bounds=None, usual_gradient_bounds=None,
        hardest=tuple(range(count)), gradients=(1.0,) * count, usual_gradient=0.1,
    )  # fmt: skip


def order(left):
    return SampleOrder(batches=6, usual=0.3, loss=2.0, shuffled=0.3 + 1.7 * left, left=left)


def experiments(episode=1, **fields):
    return Experiments(episode=episode, **fields)


class LabResult:
    """A result in shorthand: what is known about it, by the name of the experiment."""

    def __init__(self, kind, detail):
        self.kind, self.detail = kind, {k: v for k, v in detail.items() if k not in ("episode", "text")}
        self.episode = detail.get("episode", 1)


def experiments_of(results):
    """The `Experiments` of each episode that shorthand results name."""
    by_episode = {}
    for result in results:
        by_episode.setdefault(result.episode, []).append(result)
    return [_experiments(episode, found) for episode, found in by_episode.items()]


def _experiments(episode, found):
    fields = {}
    for detail in (result.detail for result in found if result.kind == "measured"):
        fields |= _measured(detail)
    by_kind = {result.kind: result.detail for result in found if result.kind != "measured"}
    if "blame" in by_kind:
        fields |= with_shares(**by_kind["blame"]["shares"])
    elif by_kind.get("split", {}).get("verdict", "not_reproduced") != "not_reproduced":
        fields |= _split(by_kind["split"])
    if "factors" in by_kind:
        fields["attribution"] = _attribution(by_kind["factors"], fields.get("attribution"))
    for kind, (name, build) in SIMPLE.items():
        if kind in by_kind:
            fields[name] = build(by_kind[kind])
    return experiments(episode, **fields)


def _split(detail):
    effects = {f"{k}_effect": v for k, v in detail.items() if k in ("data", "weights", "computation") and v is not None}
    plain = {k: v for k, v in detail.items() if k in ("noise", "jump")}
    split = split_of(detail["verdict"], **effects | plain)
    return {"replay": replay(exact=detail.get("exact", False)), "split": split}


def _born(detail):
    healthy = detail.get("with_healthy_weights", True)
    return born(detail["phase"], module=detail.get("module"), operation=detail.get("operation"), healthy=healthy)


def _remedies(detail):
    return tuple(Remedy(remedy=t["remedy"], value=t.get("value"), repaired=t["repaired"]) for t in detail["tried"])


def _attribution(detail, known):
    def parts(key):
        return {s["factor"]: s.get("share", 0.0) for s in detail.get(key) or ()}

    base = attribution() if known is None else known
    made = attribution({}, ordinal=detail.get("ordinal", base.ordinal), intrinsic=base.intrinsic, finer=parts("finer"))
    shares = tuple(
        FactorShare(factor=s["factor"], group=s.get("group", "optimizer"), share=s.get("share", 0.0), error=0.05)
        for s in detail.get("shares") or ()
    )
    return dataclasses.replace(made, shares=shares or base.shares)


def _measured(detail):
    if "direction" in detail:
        ways = {
            "turned": {"slope": -1.0, "slope_usual": 1.0}, "wrong_direction": {"against": 0.5, "against_error": 0.1},
            "too_long": {"rho": -1.0}, "ordinary": {"rho": 0.9}, "unclear": {"rho": None},
        }  # fmt: skip
        return {"update": update(**ways[detail["direction"]], step=detail.get("step", 199))}
    if "losses" in detail:
        return {"samples": samples(detail["losses"], detail["usual_losses"])}
    if "modules" in detail:
        named = {m["module"]: m for m in detail["modules"]}
        if detail.get("first") and detail["first"] not in named:
            named[detail["first"]] = {"now": {"rms": 10.0}, "usual": {"rms": 2.0}}
        return {"modules": ModuleMeasurement(modules=tuple(_module(name, m) for name, m in named.items()))}
    return {}


def _module(name, known):
    def activity(side):
        given = known.get(side, {})
        size = given.get("rms", 2.0)
        return ModuleActivity(largest=size, rms=size, zeros=0.0, saturated=None, gradient=given.get("gradient"))

    return ModuleChange(
        module=name, kind=known.get("kind", "Linear"), now=activity("now"), usual=activity("usual"), factor=2.0
    )


def _outside(detail):
    found = outside(
        detail.get("changed"), repaired=detail.get("repaired"), writes=[w["kind"] for w in detail.get("writes") or ()]
    )
    different = tuple(
        TensorDifference(
            name=d.get("name", "net.0.weight"), kind=d.get("kind", "weights"), relative=d.get("relative", 0.5),
            elements=d.get("elements", 0), changed=d.get("changed", 0), powers_of_two=d.get("powers_of_two", 0),
        )
        for d in detail.get("different") or ()
    )  # fmt: skip
    return dataclasses.replace(found, different=different)


SIMPLE = {
    "nonfinite_origin": ("first_nonfinite", _born),
    "order": ("sample_order", lambda detail: order(detail["left"])),
    "remedies": ("remedies", _remedies),
    "outside": ("outside_change", _outside),
    "not_run": ("not_run", lambda detail: detail["why"]),
}
"""By the name of a result the field that it fills, and how."""
