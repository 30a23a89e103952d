"""Ray: nodes, actors, the driver and the submission of jobs."""
