"""A Hugging Face Hub with buckets and Xet storage that runs on loopback, for tests and demos."""
