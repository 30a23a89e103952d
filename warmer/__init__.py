"""Ray actors that fill node-local LMCache tiers from a bucket before traffic arrives.

::

    cli → run ─┬─ plan                      which chunks are to be there, as a file
               ├─ cluster → schedule        which node gets which batch next
               │          └─ node → tiers   bytes into one node's tier
               ├─ check                     whether tiers hold what was planned, and engines hit it
               └─ report                    what happened

`schedule` is pure; only `cluster` imports Ray.
"""

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

_clean_logs(__name__, __path__)
