"""Number formats and what is done with them: the definition of the numerics."""
