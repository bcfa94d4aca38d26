"""Coordination of several ranks: communication, agreement on examinations, merging of their results."""
