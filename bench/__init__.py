"""Measurements side by side with named peers (`make bench`), and the long runs of the tests (`make soak`)."""
