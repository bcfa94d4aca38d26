"""The callbacks: thin, one a file. `base` has the hooks that all share, `flight` the loop that they drive together."""
