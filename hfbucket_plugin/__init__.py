"""LMCache remote storage on Hugging Face Buckets: the online path, and what the warmer and the jobs share with it.

Public are the names in `__all__`, and the two modules that configurations of LMCache name: `hfbucket_plugin.adapter` and
`hfbucket_plugin.l2_adapter`. The other modules may change in any release. See `docs/python.md`.
"""

from importlib.metadata import version as _distribution_version

from hfbucket_plugin.core.texts import clean_logs as _clean_logs
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BreakerOpenError,
    BucketMissingError,
    ConfigError,
    DeadlineError,
    HFBucketError,
    IntegrityError,
    ItemFailure,
    LocalFileError,
    MissingError,
    PartialFailureError,
    RefusedError,
    SafetyError,
    TempDirError,
    ThrottledError,
    TransportError,
)

__all__ = [
    "AccessDeniedError",
    "BreakerOpenError",
    "BucketMissingError",
    "ConfigError",
    "DeadlineError",
    "HFBucketError",
    "IntegrityError",
    "ItemFailure",
    "LocalFileError",
    "MissingError",
    "PartialFailureError",
    "RefusedError",
    "SafetyError",
    "TempDirError",
    "ThrottledError",
    "TransportError",
    "__version__",
]

_clean_logs(__name__, __path__)

__version__ = _distribution_version("lmcache-hfbucket")
