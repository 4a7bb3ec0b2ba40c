"""The core as a daemon, and what the real client tools need to find it."""
