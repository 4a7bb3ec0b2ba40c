"""Tests of the converter: a disposable VM reads an image, and pixels come back.

guest/test.ConvertImage is the service that reads it, with netpbm; guest/test-convert is
the program that calls it and checks what it says. The Makefile installs both, and
setup.cfg has that done in the template of the tests.
"""
