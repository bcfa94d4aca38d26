"""Which samples of a batch stand out: by their values, and by their losses and gradients."""
