"""What is asked about an episode beside its own numbers.

One question a file, each answered from the store alone and put into words once, for every cause that asks.
"""
