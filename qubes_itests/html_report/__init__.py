"""A run as one HTML file: made of run.json and the timelines of its tests, alone.

It asks nothing of who wrote those: they may be the artefacts of another machine.
"""
