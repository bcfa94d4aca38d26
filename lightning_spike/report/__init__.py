"""What the diagnosis found, for people and programs: `model` decides what there is to say, the renderers only say it."""
