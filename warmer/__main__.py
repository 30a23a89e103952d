"""`python -m warmer`."""

from warmer.cli import app

app(prog_name="python -m warmer")
