"""`python -m warmer`."""

from hfbucket_plugin import texts, xet_home
from hfbucket_plugin.early_signals import end_by_signals
from warmer import exits

end_by_signals(exits.INTERRUPTED)
xet_home.begin()

from warmer.cli import app  # noqa: E402 - it imports hf_xet, which opens its log then

texts.hide_in_streams()
app(prog_name="python -m warmer")
