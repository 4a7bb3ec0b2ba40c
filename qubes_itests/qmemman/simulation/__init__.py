"""Simulated machines, and what happens to the memory on them."""
