"""Loss curves, made up and of real trainings, and rules of others that watch them."""
