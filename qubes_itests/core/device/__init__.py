"""Devices: what VMs expose, have, and are to have."""
