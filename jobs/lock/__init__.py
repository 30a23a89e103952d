"""Lock of a bucket instance."""
