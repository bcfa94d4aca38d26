"""The flight recorder: signals on their way to the host, and the batches, snapshots and settings that are kept."""
