"""Export, import and retention cleanup of bucket instances.

The room is laid and empty: see the table of what is supported in README.md.
"""
