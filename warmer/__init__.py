"""Ray actors that fill node-local LMCache tiers from a bucket before traffic arrives.

::

    cli → run ─┬─ selection → plan        what is to be there, as a file
               ├─ cluster → fleet → schedule   which node gets what next
               │              └─ node → tiers  bytes into one node's tier
               └─ progress, report        what happened

`plan`, `schedule` and `report` are pure; only `cluster` and `fleet` know of Ray.
"""

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

_clean_logs(__name__, __path__)
