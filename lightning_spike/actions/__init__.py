"""Actions on the run or the disk."""
