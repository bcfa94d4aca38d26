"""The shared flight of one fit: who takes part, and the loop that runs the phases of a training step for all of them.

`participant` has the phases, `loop` runs them, `facts` reads the run's settings.
"""
