"""Everything that takes down each training step.

A signal's way to the host, the batches, snapshots and settings that are kept.
"""
