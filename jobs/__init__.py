"""Jobs that keep bucket instances in order: retention cleanup, deletion by name, export and import, key indexes, status.

::

    cli → session → run ─┬─ cleanup, remove → planning → plan     what is to go, as a file
                         │    policy → retention → ordering
                         ├─ guards, objects                        what refuses it
                         ├─ lock → claims, hubclock                one at a time, by the Hub's clock
                         ├─ apply → batch, executors → actors      what is still as planned is deleted
                         └─ report, history                        what happened

    cli → command_export → export ─┬─ endpoints → instance_end, directory_source, directory_destination (ends)
                                   ├─ choosing, rename → export_planning → export_plan
                                   ├─ moving ← carriers → actors    a try at a batch: by the Hub, or as bytes
                                   ├─ manifest                      what lies in a directory
                                   └─ mirror → run                  what goes at the destination, as a cleanup

    cli → command_index → index_job ─┬─ index_shelf, index_rules    what there is, what is due, what nobody needs
                                     ├─ index_making                a snapshot, published when it was read back
                                     ├─ index_verify                index against listing
                                     ├─ index_prune → apply         old snapshots and journals go
                                     └─ lock, keeper, index_report
    run, export → index_teller                                      tells the index what was put and deleted

`index_rules`, `retention`, `guards`, `claims`, `policy` and `rename` are pure; only `actors` and `ray_counts` know of Ray. They delete other people's data, so they
fail closed.
"""

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

_clean_logs(__name__, __path__)
