"""Outliers among the samples of a batch, by values, losses and gradients."""
