"""Electrons, the lens and the detector."""
