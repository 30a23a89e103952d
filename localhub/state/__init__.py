"""What a Hub keeps under its root directory."""
