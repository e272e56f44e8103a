"""The calibrated transform profiles: what they store and how they restore it."""
