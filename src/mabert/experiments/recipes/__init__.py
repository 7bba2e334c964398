"""Functions that return one complete frozen config each."""
