"""A Hugging Face Hub with buckets and Xet storage that runs on loopback, for tests and demos; see docs/localhub.md.

Public are `localhub.process`, `localhub.client` and `localhub.faults`; the other modules may change without notice.
"""
