"""Index job: build, verify, prune."""
