"""Start of a guest, cold or warm, and its network."""
