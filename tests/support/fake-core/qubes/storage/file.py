"""A driver that has device mapper make its devices, by two scripts."""

CREATE_SCRIPT = "/usr/lib/qubes/create-snapshot"
DESTROY_SCRIPT = "/usr/lib/qubes/destroy-snapshot"
