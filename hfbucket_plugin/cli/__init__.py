"""Command line `python -m hfbucket_plugin`: inspects instances, with the configuration of the engines.

Only this part of the package needs `typer` and `rich` (the extra `tools`). No engine imports it; `jobs` uses the same
output.
"""
