"""Tests of a service that a unit of the user's systemd gives.

guest/test-greeter.socket listens in the session of the user, if the VM has the feature
`service.test-greeter`; guest/test.Greeter brings calls of other VMs to it. The Makefile
installs them, and setup.cfg has that done in a template whose guests boot with systemd.
"""
