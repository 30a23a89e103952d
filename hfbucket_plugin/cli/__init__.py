"""The command line, `python -m hfbucket_plugin`: looks at instances, with the configuration that engines use.

The only part of the package that needs `typer` and `rich` (the extra `tools`). No engine imports it; `jobs` says and shows things in the same way.
"""
