"""Suites that anybody's implementation of one of the contracts can be tested with."""
