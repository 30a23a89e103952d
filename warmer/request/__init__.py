"""What a warm-up is asked to do, and what that means on this configuration."""
