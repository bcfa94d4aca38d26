"""Exact Shapley values of a few factors, from the outcome of every combination of them."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from lightning_spike.lab.evaluate import Numbers

__all__ = ["combinations", "shapley"]


def combinations(players: Sequence[str]) -> list[frozenset[str]]:
    """All subsets, the empty one first."""
    sizes = range(len(players) + 1)
    return [frozenset(chosen) for size in sizes for chosen in itertools.combinations(players, size)]


def shapley(players: Sequence[str], value: Callable[[frozenset[str]], Numbers]) -> dict[str, Numbers]:
    """Each player's mean contribution over all orders in which they can come (Shapley 1953).

    They add up to the value of all together less that of none; a player who never changes the value gets 0.

    Args:
        players: Names, each once; the cost grows as 2^n.
        value: Of a coalition; any array, the same shape for all. The values are taken entry by entry, so that a row of repetitions gives a row of shares.
    """
    n = len(players)
    worth = {coalition: np.asarray(value(coalition), dtype=np.float64) for coalition in combinations(players)}
    weight = [math.factorial(k) * math.factorial(n - k - 1) / math.factorial(n) for k in range(n)]
    return {
        player: np.asarray(
            sum(weight[len(s)] * (worth[s | {player}] - worth[s]) for s in worth if player not in s), dtype=np.float64
        )
        for player in players
    }
