"""The faults, one file for each cause or family; `registry` finds them here."""
