"""Plans: which chunks a warm-up copies."""
