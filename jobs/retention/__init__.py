"""Retention rules: which chunks may be deleted, and in which order."""
