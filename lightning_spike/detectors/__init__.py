"""Detectors: numbers in, findings out; resumable, bounded, no torch."""
