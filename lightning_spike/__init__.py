"""Root causes for loss spikes, from inside the training run."""

__version__ = "0.1.0"
