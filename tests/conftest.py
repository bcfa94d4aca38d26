"""What every test watches: a part of the suite that broke without the test expecting it."""

import pytest

from lightning_spike.flight import warn as warn_module


@pytest.fixture(autouse=True)
def swallowed_warnings(monkeypatch):
    """Warnings of ours never raise, so an unexpected one would pass unseen; here it fails the test. `pytest.warns` takes the expected ones first."""
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
