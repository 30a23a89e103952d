"""The checks of `doctor`, one a file. Each says what it found; those that ask the Hub raise what they cannot word."""
