"""dom0 for a core that is not ours: what a checkout of core-admin finds around it.

Stand-ins for the modules that it imports, the programs that it starts, and the
directories that it expects, over the hypervisor contract and its guests. Each offers
what such a core has been seen to ask for; anything else is an error that names it.
"""
