"""The host that a run needs: sandbox, loop devices, mounts, cache, checks."""
