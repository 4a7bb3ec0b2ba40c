"""A suite that needs a display; what it imports is not there either."""

raise ImportError("never imported")
