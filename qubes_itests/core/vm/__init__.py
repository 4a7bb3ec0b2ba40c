"""The VM classes of the bundled core."""
