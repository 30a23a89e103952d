"""The formats of Xet storage: hashes, xorbs, shards and reconstructions."""
