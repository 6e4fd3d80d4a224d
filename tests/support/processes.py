"""Two processes that run one program together."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def run_two(program, *arguments):
    """What each of two processes prints that run a program with its rank and other arguments."""

    def run(rank):
        command = [sys.executable, "-W", "ignore", "-c", program, str(rank), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(run, range(2)))
    for done in runs:
        assert done.returncode == 0, done.stderr
    return [done.stdout for done in runs]
