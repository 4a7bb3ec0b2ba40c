"""Tests of what every Qubes VM must be able to do."""
