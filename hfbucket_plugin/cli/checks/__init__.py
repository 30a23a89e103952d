"""Checks of `doctor`, one module each. Checks return findings; those that contact the Hub raise unhandled errors."""
