"""What the tests of storage are given besides the fixtures of the plugin."""

from hypothesis import settings

# pytest --hypothesis-profile=long --itests-timeout=0 FILE: an hour or so.
settings.register_profile("long", max_examples=5_000, stateful_step_count=100)
