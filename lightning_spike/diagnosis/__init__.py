"""Store in, ranked causes out: pure, no torch, no Lightning.

`case` puts the questions about one episode, `causes/` has one file for every cause, `catalogue` finds them, `rank` weighs them up.
"""
