"""Attacks: faulty files and values by the hundred, each of which must end in an error of our own, or in nothing bad.

One module per kind has two functions:

- `cases()` yields (name, case), without an end where cases are made from a number.
- `run(case, folder)` attacks once and returns the `LatentRTError` that refused the case, or None where nothing bad
  came of it. Any other exception is a defect, `AssertionError` a success of the attack. `folder` is of this kind alone
  and empty at first.

Tests run a part of the cases; `make attack` runs all (`python -m tests.attack --help`).
"""
