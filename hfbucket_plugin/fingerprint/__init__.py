"""Fingerprints: which model and engine configuration wrote the chunks of a prefix."""
