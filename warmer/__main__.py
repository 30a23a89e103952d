"""`python -m warmer`."""

from hfbucket_plugin.core import texts
from hfbucket_plugin.hub import xet_home
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.signals import end_by_signals

end_by_signals(exit_codes.INTERRUPTED)
xet_home.begin()

from warmer.cli.app import app  # noqa: E402 - imports hf_xet, which opens its log on import

texts.hide_in_streams()
app(prog_name="python -m warmer")
