"""Replay: repeats, rewinds, evaluates and compares updates."""
