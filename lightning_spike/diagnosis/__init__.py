"""Ranks the causes of every episode from the store alone; pure, without torch and Lightning.

`view` is one episode in its run, `observations/` holds the questions that causes share, `causes/` one file per cause.
`catalogue` finds the causes, `examine` and `weigh` make probabilities of their evidence, `rank` the diagnosis.
"""
