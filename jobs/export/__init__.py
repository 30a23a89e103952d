"""Exports between instances and directories."""
