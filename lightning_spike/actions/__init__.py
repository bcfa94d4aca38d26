"""Actions: what is kept for, written about and done to a run; with `lab` the only code that may change it."""
