"""Batches of items, applied with retries in this process or on Ray actors."""
