"""The VMs of a test as they were at one moment, in a folder: frozen, and thawed."""
