"""Seconds to load the 6,252 drawings, sha256 checked: the median of fresh processes, after the imports."""

import statistics
import subprocess
import sys

RUNS = 7
LOAD = """
import time
from course_utils.data import all_drawings

start = time.perf_counter()
count = len(all_drawings())
print(time.perf_counter() - start, count)
"""


def load() -> float:
    """Seconds of one load in a process of its own."""
    run = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)
    seconds, count = run.stdout.split()
    assert int(count) == 6252
    return float(seconds)


if __name__ == "__main__":
    seconds = [load() for _ in range(RUNS)]
    print("runs:", *(f"{each:.2f}" for each in seconds))
    print(f"seconds: {statistics.median(seconds):.2f}")
