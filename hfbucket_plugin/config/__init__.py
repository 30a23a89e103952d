"""Settings of an instance and of L2, and the LMCache configuration that names the instances."""
