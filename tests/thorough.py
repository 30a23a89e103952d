"""How long models are compared with the real thing: a little at each run of the tests, and `make thorough` for long."""

import os

FACTOR = int(os.environ.get("TEST_EXAMPLES_FACTOR", "1"))


def examples(number):
    """The number of examples of a model that is slow, since each has a bucket of its own."""
    return number * FACTOR
