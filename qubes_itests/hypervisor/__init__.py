"""Hypervisors behind one contract."""

import os

# libvirt reads this when it is first imported. Its errors reach us as exceptions; what
# it logs besides would only get in the way of a run's own output.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")
