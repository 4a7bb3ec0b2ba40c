"""The network of VMs: addresses, interfaces, routes and firewall rules."""
