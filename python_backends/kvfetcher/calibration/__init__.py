"""Making calibrations: an offline tool that runs a model over texts."""
