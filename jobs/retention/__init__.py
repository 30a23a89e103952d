"""Retention rules: which chunks may go, and in which order."""
