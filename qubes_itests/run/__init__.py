"""One run: its settings, what is prepared before it, and what all its tests share."""
