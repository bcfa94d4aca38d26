"""The callbacks: thin, one a file. `base` has the Lightning hooks that all share and passes them on to the flight."""
