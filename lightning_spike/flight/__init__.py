"""The shared flight of one fit: the loop that runs the phases of a training step for all who take part.

`loop` runs them, `facts` reads the run's settings; the phases themselves are in `record.participant`.
"""
