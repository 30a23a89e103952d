"""Cleanup and `rm`: plan, checks, deletes."""
