"""The fault matrix and the soak: what a failing Hub does to an engine, tried on every operation of both surfaces.

`python -m dev.faults` (`make faults`) makes every trial and writes its table into docs/reliability.md; `python -m dev.faults.soak`
(`make soak`) switches faults on and off at random under load. What is promised stands in `dev.faults.guarantees` and nowhere else.
"""
