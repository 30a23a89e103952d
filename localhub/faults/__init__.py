"""Injected faults: the rules, and their application to requests."""

from localhub.faults.rules import Fault

__all__ = ["Fault"]
