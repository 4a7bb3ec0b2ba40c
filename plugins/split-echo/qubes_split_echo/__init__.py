"""Tests of a service in one VM, called from another."""
