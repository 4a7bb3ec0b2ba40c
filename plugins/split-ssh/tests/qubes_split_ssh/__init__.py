"""Tests of split-ssh: the keys are in one VM's ssh-agent, and another one uses them.

guest/test-ssh-listen makes a socket in the VM without keys; each connection to it calls
guest/test.SshAgent in the VM with the agent that guest/test-ssh-agent has started. The
Makefile installs all three, and setup.cfg has that done in the template of the tests.
"""
