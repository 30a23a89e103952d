"""The chunk store: lookups, reads and writes of one instance."""
