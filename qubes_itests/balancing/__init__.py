"""Memory balancing of real VMs: qmemman for the VMs of one app.

`app_memory` runs the daemon for an app; `guest_memory` has a guest use memory.
"""
