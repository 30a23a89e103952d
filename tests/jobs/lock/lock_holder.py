"""A process that wants the lock of an instance. Says what it got, waits for a line, confirms, and says what came of it."""

import sys

from hfbucket_plugin.errors import RefusedError
from jobs.lock.lock import BucketLock
from tests.support.buckets import opened


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(endpoint, bucket_id, what_for, seconds):
    with opened(endpoint, bucket_id, "kv") as bucket:
        try:
            with BucketLock(bucket, what_for, seconds=int(seconds)).held() as lock:
                say("held")
                sys.stdin.readline()
                lock.confirm()
                say("confirmed")
        except RefusedError as error:
            say(f"refused: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
