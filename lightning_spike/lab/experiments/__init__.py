"""What is asked of a moment that was run again; one question a file."""
