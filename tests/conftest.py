"""What every test watches: a part of the suite that broke without the test expecting it."""

import os

import pytest
from hypothesis import settings

from lightning_spike.flight import warn as warn_module

# A loaded machine is no reason to fail; and where a result must be the same each time, so are the examples.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


@pytest.fixture(autouse=True)
def swallowed_warnings(monkeypatch):
    """Warnings of ours never raise, so an unexpected one would pass unseen; here it fails the test.

    `pytest.warns` takes the expected ones first.
    """
    swallowed = []
    original = warn_module.rank_zero_warn

    def noted(message, *args, **kwargs):
        try:
            original(message, *args, **kwargs)
        except Warning:
            swallowed.append(message)
            raise

    monkeypatch.setattr(warn_module, "rank_zero_warn", noted)
    yield swallowed
    assert not swallowed, swallowed
