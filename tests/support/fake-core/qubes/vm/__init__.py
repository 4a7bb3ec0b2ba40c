"""VMs of a core."""
