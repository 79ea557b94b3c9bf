"""Runs every case of these attacks, or of the kinds that are named: `python -m tests.attack KIND …`.

Exit code 1 if a case succeeds, takes longer than 5 seconds, or ends in an error that is none of ours.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path

KINDS = ("external_data", "manifest")
_MOST_SECONDS = 5


def main(kinds: list[str]) -> int:
    failed = 0
    for kind in kinds or KINDS:
        module, began, count = importlib.import_module(f"tests.attack.{kind}"), time.monotonic(), 0
        with tempfile.TemporaryDirectory() as scratch:
            for case in module.cases():
                started, count = time.monotonic(), count + 1
                try:
                    module.run(case, Path(scratch) / "bundle")
                except Exception:
                    failed += 1
                    print(f"{kind}: {case.name}\n{traceback.format_exc()}")
                if time.monotonic() - started > _MOST_SECONDS:
                    failed += 1
                    print(f"{kind}: {case.name} took {time.monotonic() - started:.1f} s")
        print(f"{kind}: {count} cases in {time.monotonic() - began:.0f} s, {failed} failed so far")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
