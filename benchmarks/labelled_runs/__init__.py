"""Labelled trainings.

Tasks, faults put into them, what was recorded, and how the diagnosis of it is judged and fitted.
"""
