"""The Hub: client, limits, bucket, transfers, metadata records, listings."""
