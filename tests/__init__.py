"""The tests: each stands at the address of what it tests. A package, since a dependency installs one of the same name."""
