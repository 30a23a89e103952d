"""Access statistics of chunks: recorded by engines, published with the index."""
