"""What training could not bear to measure, measured in the re-run; one kind of measurement a file."""
