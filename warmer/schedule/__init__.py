"""Which node fetches which chunk, and when. Plain Python, without Ray."""
