"""The lock of a bucket."""
