"""LMCache remote storage on Hugging Face Buckets: the online path, and what the warmer and the jobs share with it.

Nothing heavy is imported here: `hfbucket_plugin.adapter` is what LMCache loads, and the other modules stand alone.
"""

from importlib.metadata import version as _distribution_version

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

_clean_logs(__name__, __path__)

__version__ = _distribution_version("lmcache-hfbucket")
