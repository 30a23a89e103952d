"""`python -m jobs`."""

from hfbucket_plugin import texts, xet_home
from hfbucket_plugin.early_signals import end_by_signals
from jobs import exits

end_by_signals(exits.INTERRUPTED)
xet_home.begin()

from jobs.cli import app  # noqa: E402 - it imports hf_xet, which opens its log then

texts.hide_in_streams()
app(prog_name="python -m jobs")
