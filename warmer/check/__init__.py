"""Checks before traffic: what nodes hold, and canary prompts."""
