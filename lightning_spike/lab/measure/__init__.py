"""Measurements in the replay that are too expensive in training."""
