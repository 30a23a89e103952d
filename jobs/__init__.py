"""Jobs that keep bucket instances in order: retention cleanup, deletion by name, export and import, key indexes, status.

::

    cli → session ─┬─ deletion    cleanup, deletion by name, and the chunks that a mirror deletes at its destination
                   ├─ export      export, import and mirror
                   ├─ index       build, verify and prune a key index
                   └─ status      what an instance holds, and what the next cleanup would do

    deletion, export, index → batch        apply a plan in batches, in this process or on Ray actors
                            → lock         one job at a time, by the Hub's clock
                            → retention    the policy: which chunks expire, and in which order
                            → report, history

`retention` is pure but for the sort on disk; only `batch.ray_pool` imports Ray. Jobs delete data, so every check fails
closed.
"""

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

_clean_logs(__name__, __path__)
