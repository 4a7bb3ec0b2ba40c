"""The state of an app as a file in the style of `qubes.xml`."""
