"""The address of the classic adapter in LMCache's configuration.

The two keys of an instance are `module_path: hfbucket_plugin.adapter` and `class_name: HFBucketConnectorAdapter`. The
adapter itself is in `hfbucket_plugin.engine.classic`.
"""

from hfbucket_plugin.engine.classic import HFBucketConnectorAdapter

__all__ = ["HFBucketConnectorAdapter"]
