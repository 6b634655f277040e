"""While a script runs: starting and joining processes, saving and loading, seeds."""
