"""Store in, ranked causes out: pure, no torch, no Lightning.

`case` is one episode beside all that is known of the run, `observations/` what can be asked about it, `causes/` has one
file for every cause, `catalogue` finds them, `rank` weighs them up.
"""
