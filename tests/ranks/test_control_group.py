"""When there is a group for the ranks.

That it works is tested with two processes in tests/callbacks/test_rank_sync_monitor.py and
test_counterfactual_replay_ranks.py.
"""

from types import SimpleNamespace

import torch

from lightning_spike.ranks.control_group import ControlGroup, why_no_control_group


class ShardingStrategy:
    model = torch.nn.Linear(1, 1)


def test_a_single_process_needs_none_and_has_none():
    alone = SimpleNamespace(world_size=1, strategy=ShardingStrategy())
    assert why_no_control_group(alone) is None
    assert ControlGroup.of(alone) is None


def test_other_strategies_than_ddp_are_refused_by_name():
    sharded = SimpleNamespace(world_size=2, strategy=ShardingStrategy())
    assert why_no_control_group(sharded).endswith("under DDP only, and this is ShardingStrategy")
    assert ControlGroup.of(sharded) is None
