"""The way back: updates made again, undone, evaluated and compared."""
