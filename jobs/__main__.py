"""`python -m jobs`."""

from hfbucket_plugin import xet_home

xet_home.begin()

from jobs.cli import app  # noqa: E402 - it imports hf_xet, which opens its log then

app(prog_name="python -m jobs")
