"""The experiments of a replay, one per file."""
