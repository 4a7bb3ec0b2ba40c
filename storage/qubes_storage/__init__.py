"""Storage of VM images: pools, volumes and their drivers."""
