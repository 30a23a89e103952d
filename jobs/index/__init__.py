"""The index job: build, verify, prune."""
