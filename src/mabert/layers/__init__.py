"""The boxes of the paper, one a file."""
