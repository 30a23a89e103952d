"""What the command lines of the three packages share."""
