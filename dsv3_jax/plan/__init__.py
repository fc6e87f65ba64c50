"""Compiles the program of a run for devices that are not here, and says what it needs of each of them."""
