"""The Admin API: what qubesd answers on its socket, and to VMs by qrexec."""
