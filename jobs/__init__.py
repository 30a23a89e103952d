"""Jobs that keep bucket instances in order: retention cleanup, deletion by name, status.

::

    cli → session → run ─┬─ cleanup, remove → planning → plan     what is to go, as a file
                         │    policy → retention → ordering
                         ├─ guards, objects                        what refuses it
                         ├─ lock → claims, hubclock                one at a time, by the Hub's clock
                         ├─ apply → batch, executors → actors      what is still as planned is deleted
                         └─ report, history                        what happened

`retention`, `guards`, `claims` and `policy` are pure; only `actors` knows of Ray. They delete other people's data, so they
fail closed.
"""
