"""The sessions of a shell that pages show: `$ command`, further lines of it after `> `, then what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path


def run_session(block: str, folder: Path) -> int:
    """Run the commands of a console block in a folder and compare what they print; returns how many there are."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    sessions = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    for session in sessions:
        lines = session.splitlines()
        script = [lines.pop(0)]
        while lines and lines[0].startswith("> "):
            script.append(lines.pop(0)[2:])
        command = ["bash", "-c", "\n".join(script)]
        done = subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.stdout.rstrip().splitlines() == "\n".join(lines).rstrip().splitlines(), script
    return len(sessions)
