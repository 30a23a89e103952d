"""Faults on order: rules, and how they are applied to requests."""

from localhub.faults.rules import Fault

__all__ = ["Fault"]
