"""Attacks: faulty files by the hundred, each of which must end in an error of our own, or in nothing bad.

One module per kind has `cases()`, named mutations, and `run(case, folder)`, which raises if the attack succeeds. Tests
run a part of the cases; `make attack` runs all.
"""
