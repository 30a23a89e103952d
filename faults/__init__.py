"""The fault matrix: what a failing Hub does to an engine, tried on every operation of both surfaces.

`python -m faults` (`make faults`) makes every trial and writes its table into docs/reliability.md. What is promised stands
in `faults.promises` and nowhere else.
"""
