"""Observers and measurements that several causes share, one topic a file; pure functions of the store."""
