"""The tests: a file per promise, and the oracle that they share with the benchmark."""
