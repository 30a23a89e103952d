import copy
import inspect
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
from ray import cloudpickle

from hfbucket_plugin import errors
from hfbucket_plugin.errors import HFBucketError, ItemFailure

# Kinds label metrics and reports that outlive a release: one that changes here breaks somebody's dashboard.
TREE = {
    "HFBucketError": ((Exception,), "error"),
    "ConfigError": ((HFBucketError, ValueError), "config"),
    "KeyFormatError": ((HFBucketError, ValueError), "key"),
    "RefusedError": ((HFBucketError, ValueError), "refused"),
    "SafetyError": ((errors.RefusedError,), "refused"),
    "MissingError": ((HFBucketError, LookupError), "missing"),
    "ObjectMissingError": ((errors.MissingError,), "missing"),
    "BucketMissingError": ((errors.MissingError,), "bucket_missing"),
    "AccessDeniedError": ((HFBucketError, PermissionError), "denied"),
    "ThrottledError": ((HFBucketError,), "throttled"),
    "BudgetError": ((errors.ThrottledError,), "budget"),
    "BreakerOpenError": ((HFBucketError,), "breaker"),
    "TransportError": ((HFBucketError, ConnectionError), "transport"),
    "DeadlineError": ((errors.TransportError, TimeoutError), "deadline"),
    "UnsentError": ((errors.DeadlineError,), "deadline"),
    "RevokedError": ((HFBucketError,), "revoked"),
    "IntegrityError": ((HFBucketError,), "integrity"),
    "HashMismatchError": ((errors.IntegrityError,), "integrity"),
    "TempDirError": ((HFBucketError,), "scratch"),
    "LocalFileError": ((HFBucketError, OSError), "file"),
    "PartialFailureError": ((HFBucketError,), "partial"),
}

FIELDS = {
    "LocalFileError": {"number": 28},
    "AccessDeniedError": {"status": 403},
    "ThrottledError": {"retry_after": 12.5},
    "PartialFailureError": {"failures": (ItemFailure("a", "hub", "no"), ItemFailure("b", "deadline", "late"))},
}

EXAMPLES = [getattr(errors, name)(f"what {name} says: ü", **FIELDS.get(name, {})) for name in TREE]


def _unpickled(data):
    return pickle.loads(data)  # noqa: S301 - what this test pickled


def _raise_example(number):
    raise EXAMPLES[number]


def test_the_tree_and_its_kinds_are_what_handlers_rely_on():
    found = {
        name: (cls.__bases__, cls.kind)
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, HFBucketError)
    }

    assert found == TREE


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "copied",
    [
        lambda error: _unpickled(pickle.dumps(error)),
        lambda error: _unpickled(pickle.dumps(error, protocol=0)),
        lambda error: _unpickled(cloudpickle.dumps(error)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle", "protocol-0", "cloudpickle", "copy", "deepcopy"],
)
def test_every_error_comes_back_with_its_fields(error, copied):
    back = copied(error)

    assert type(back) is type(error)
    assert str(back) == str(error) == error.message
    assert back.args == error.args
    assert vars(back) == vars(error)
    assert back.kind == error.kind


def test_notes_and_subclasses_with_fields_of_their_own_survive_too():
    class OwnError(errors.RefusedError):
        def __init__(self, *, key: str, size: int) -> None:
            super().__init__(f"{key}: {size}")
            self.key, self.size = key, size

    error = OwnError(key="k", size=3)
    error.add_note("seen by worker 4")

    back = _unpickled(cloudpickle.dumps(error))

    assert (back.key, back.size, str(back), back.__notes__) == ("k", 3, "k: 3", ["seen by worker 4"])


def test_errors_cross_a_process_border_as_themselves():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        raised = [processes.submit(_raise_example, number).exception() for number in range(len(EXAMPLES))]

    assert [(type(error), str(error)) for error in raised] == [(type(error), str(error)) for error in EXAMPLES]
    assert [vars(error) for error in raised] == [vars(error) for error in EXAMPLES]


def test_handlers_of_the_standard_library_catch_them():
    with pytest.raises(TimeoutError):
        raise errors.DeadlineError("late")
    with pytest.raises(ConnectionError):
        raise errors.DeadlineError("late")
    with pytest.raises(PermissionError):
        raise errors.AccessDeniedError("no", 401)
    with pytest.raises(LookupError):
        raise errors.BucketMissingError("none")
