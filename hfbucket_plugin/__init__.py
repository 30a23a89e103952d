"""LMCache remote storage on Hugging Face Buckets."""
