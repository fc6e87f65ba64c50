"""Serving: sampling, and prefill and decode as one jitted program."""
