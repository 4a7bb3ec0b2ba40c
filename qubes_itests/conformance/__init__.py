"""Conformance suites for implementations of the contracts, by anybody."""
