"""Keys, deadlines, concurrency, buffers, files, telemetry, units: nothing here knows the Hub or LMCache."""
