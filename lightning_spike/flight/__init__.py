"""The shared flight of one fit: `loop` runs the phases of a training step, `facts` reads the run's settings."""
