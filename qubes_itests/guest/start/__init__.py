"""The start of a guest: cold or warm, and who it is."""
