"""Complete settings of runs."""
