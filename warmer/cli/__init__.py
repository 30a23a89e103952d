"""The command line `python -m warmer`."""
