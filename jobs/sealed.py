"""Plans of jobs are sealed as those of the warmer are: see `hfbucket_plugin.sealed`."""

from __future__ import annotations

from hfbucket_plugin.sealed import Sealed

__all__ = ["Sealed"]
