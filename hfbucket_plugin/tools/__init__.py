"""Shared parts of the command lines of the three packages."""
