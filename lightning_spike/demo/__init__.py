"""Small real tasks that train in seconds on two CPU cores, and the demos that make them go wrong.

The modules and data modules here are written as any user would write theirs: nothing of `lightning_spike` is in them.
"""
