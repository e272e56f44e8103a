"""Calibrated transforms: from a model's own statistics to the bases that the ladder codes with."""
