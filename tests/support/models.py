"""Models that are compared with the real thing, and property tests: how many examples, of what, run how."""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

FACTOR = int(os.environ.get("TEST_EXAMPLES_FACTOR", "1"))
"""A little at each run of the tests, and `make thorough` for long."""

untimed = settings(deadline=None)
"""How long an example takes is no matter of any test's."""

any_text = st.text(st.characters(exclude_categories=["Cs"]))
field_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@"), min_size=1)
"""What may stand between two '@' of a key."""


def examples(number):
    """The number of examples of a model that is slow, since each has a bucket of its own."""
    return number * FACTOR


def run_on_hub(machine, hub, new_bucket, directory, monkeypatch, *, max_examples, steps):
    """Run a model beside the real thing on a Hub of the tests; each example has buckets of its own.

    Args:
        machine: The class of the model; it finds the other arguments as `hub`, `new_bucket`, `directory` and `monkeypatch`.
        hub: A running Hub.
        new_bucket: Makes a bucket on it.
        directory: Of the test.
        monkeypatch: Of the test.
        max_examples: See `examples`.
        steps: Of each example.
    """
    given = {"hub": hub, "new_bucket": staticmethod(new_bucket), "directory": directory, "monkeypatch": monkeypatch}
    run_state_machine_as_test(
        type("OnThis", (machine,), given),
        settings=settings(
            max_examples=examples(max_examples),
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],  # shrinking would take minutes of requests
        ),
    )
