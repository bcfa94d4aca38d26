"""Run `training_step` again and leave no trace."""
