"""The work of an actor on its node."""
