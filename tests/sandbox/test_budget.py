"""Which episodes get a full examination, which a triage, and which none."""

from lightning_spike.sandbox.budget import Budget


def asked(budget, *, severity=5.0, elapsed=100.0, full=10.0, triage=1.0):
    return budget.extent(severity=severity, elapsed=elapsed, full=full, triage=triage)


def budget_after(*seconds, severity=5.0):
    """2 % of the run and 5 s: 7 s after 100."""
    budget = Budget(share=0.02, free=5.0)
    for each in seconds:
        budget.book(each, extent="full", severity=severity)
    return budget


def test_the_first_is_examined_whatever_it_takes():
    assert asked(budget_after(), full=1e6) == "full"


def test_another_is_if_it_fits():
    assert asked(budget_after(2.0), full=4.9) == "full"
    assert asked(budget_after(2.0), full=5.1) == "triage"


def test_the_budget_grows_with_the_run():
    assert asked(budget_after(6.0), full=5.0) == "triage"
    assert asked(budget_after(6.0), full=5.0, elapsed=400.0) == "full"


def test_one_that_is_worse_than_all_before_may_overdraw():
    assert asked(budget_after(6.0), full=7.0, severity=9.0) == "full"
    assert asked(budget_after(6.0), full=7.0, severity=4.0) == "triage"
    assert asked(budget_after(13.5), full=7.0, severity=9.0) is None


def test_where_not_even_a_triage_fits_there_is_none():
    assert asked(budget_after(6.5), full=5.0) is None


def test_a_triage_is_booked_but_counts_for_no_examination():
    budget = Budget(share=0.02, free=5.0)
    budget.book(3.0, extent="triage", severity=9.0)
    assert (budget.examined, budget.spent) == (0, 3.0)
    assert asked(budget, full=1e6) == "full"
