"""A policy: each has twice what it uses."""

FACTOR = 2


def pref_mem(domain):
    return min(int(domain.mem_used * FACTOR), domain.mem_max)
