"""Real vLLM on CPU: it produces KV into a bucket, and hits on what the warmer put into a tier. See docs/e2e.md."""
