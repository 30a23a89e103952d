"""`python -m warmer`."""

from hfbucket_plugin import texts, xet_home

xet_home.begin()

from warmer.cli import app  # noqa: E402 - it imports hf_xet, which opens its log then

texts.hide_in_streams()
app(prog_name="python -m warmer")
