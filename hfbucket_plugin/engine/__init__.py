"""LMCache's interfaces: classic connector and MP adapter."""
