"""What an update was made with, one factor per file: each can be put at its recent normal value."""
