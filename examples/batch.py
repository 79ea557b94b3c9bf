"""A batch job: generate an image for each line of a JSON-lines file, and resume where an earlier run stopped.

    python examples/batch.py requests.jsonl images --bundle sample

A line is an object with a prompt and any other options of a request by their names in Python. Image i of the file is
`images/i.png`. A line that fails is reported and the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentrt import LatentRTError, Pipeline, SafetyError

MAX_LINE_CHARACTERS = 100_000


def read_requests(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the options of each request; those of a line that is no JSON object are {"error": …}."""
    with path.open(encoding="utf-8") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_CHARACTERS):
            if line.strip():
                try:
                    options = json.loads(line)
                except ValueError as error:
                    options = {"error": str(error)}
                yield number, options if isinstance(options, dict) else {"error": "expected a JSON object"}
                number += 1


def run(pipeline: Pipeline, requests: Path, folder: Path) -> int:
    """Generate the images that are not there yet; return the number of lines that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for number, options in read_requests(requests):
        place = folder / f"{number:06}.png"
        if place.exists():  # written whole or not at all, so it is complete
            continue
        try:
            if "error" in options:
                raise ValueError(options["error"])
            # Without a seed of its own a line has its number, so that a second run gives the same images.
            result = pipeline(**{"seed": number, **options})
            (place,) = result.save(place)
        except SafetyError:
            raise  # no image of this bundle can be checked
        except (LatentRTError, TypeError, ValueError) as error:
            failed += 1
            print(f"line {number}: {error}", file=sys.stderr)
        else:
            print(f"{place}: seed {result.seeds[0]}")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate an image for each line of a JSON-lines file.")
    parser.add_argument("requests", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bundle", default="sample")
    arguments = parser.parse_args()
    sys.exit(1 if run(Pipeline.load(arguments.bundle), arguments.requests, arguments.folder) else 0)
