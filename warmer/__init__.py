"""Ray actors that fill node-local LMCache tiers from a bucket before traffic arrives."""
