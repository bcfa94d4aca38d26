"""Which changes of an optimizer's settings are told: those of what had stood still, not what a schedule moves."""

import torch

from lightning_spike.record.setting_changes import CONSTANT_UPDATES, SettingChange, SettingChanges


def stepped(optimizer, scheduler=None, *, updates):
    """What `SettingChanges` says in a run of updates, by update; `updates` maps some of them to what is set before."""
    changes, told = SettingChanges(), {}
    for update in range(max(updates) + 3):
        optimizer.param_groups[-1].update(updates.get(update, {}))
        if found := changes.of(optimizer):
            told[update] = found
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return told


def adam(**options):
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def test_a_setting_that_had_stood_still_is_told_once():
    told = stepped(adam(weight_decay=0.01), updates={20: {"weight_decay": -15.0}})
    assert told == {20: [SettingChange(group=1, name="weight_decay", before=0.01, after=-15.0)]}


def test_betas_are_compared_by_value_and_rates_are_left_to_others():
    told = stepped(adam(), updates={12: {"betas": [0.9, 0.999], "lr": 7.0}, 14: {"betas": [0.99, 0.999]}})
    assert told == {14: [SettingChange(group=1, name="betas", before=(0.9, 0.999), after=(0.99, 0.999))]}


def test_what_a_schedule_moves_with_every_update_is_not_told():
    optimizer = adam()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    assert stepped(optimizer, scheduler, updates={60: {}}) == {}


def test_what_has_just_been_set_is_not_yet_a_standing_setting():
    told = stepped(adam(), updates={CONSTANT_UPDATES - 1: {"eps": 1e-3}, 30: {"eps": 1e-8}})
    assert list(told) == [30]


def test_groups_are_counted_from_one():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1)
    ((change,),) = stepped(optimizer, updates={9: {"momentum": 0.99}}).values()
    assert (change.group, change.name, change.after) == (2, "momentum", 0.99)
