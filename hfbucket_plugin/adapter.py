"""Import path of the classic adapter for LMCache's configuration.

An instance is configured with `module_path: hfbucket_plugin.adapter` and `class_name: HFBucketConnectorAdapter`. The
implementation is in `hfbucket_plugin.engine.classic`.
"""

from hfbucket_plugin.engine.classic import HFBucketConnectorAdapter

__all__ = ["HFBucketConnectorAdapter"]
