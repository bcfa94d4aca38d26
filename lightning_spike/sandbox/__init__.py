"""Run `training_step` again and restore all state afterwards."""
