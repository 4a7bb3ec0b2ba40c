"""Tests of split-gpg: the secret key is in one VM, and another one uses it.

guest/test.Gpg is a qrexec service for the VM with the key, guest/test-gpg the program
that calls it: it hands over options, input and output. The Makefile installs both, and
setup.cfg has that done in the template of the tests.
"""
