"""Guests: their images, the agent in them, and how they boot."""
