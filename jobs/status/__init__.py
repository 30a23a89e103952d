"""Status of a bucket instance."""
