"""The lab: run a moment of the training again, look at it as slowly as it takes, and leave no trace."""
