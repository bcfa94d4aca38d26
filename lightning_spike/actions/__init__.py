"""What acts on the run or the disk."""
