"""The report for people and programs: `model` has its content, the other modules render, write or read it."""
