"""Several ranks: how they talk, agree on what is examined, and make one answer of what each has found."""
