"""The address of the MP adapter in `lmcache server --l2-adapter`: `"module_path": "hfbucket_plugin.l2_adapter"`.

The adapter itself is in `hfbucket_plugin.engine.mp`.
"""

from hfbucket_plugin.engine.mp import HFBucketL2Adapter, HFBucketL2AdapterConfig

__all__ = ["HFBucketL2Adapter", "HFBucketL2AdapterConfig"]
