"""The status of a bucket."""
