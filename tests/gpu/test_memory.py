"""Weights go from disk onto the device leaf by leaf (JAX, torch): the host never holds a second copy of a model."""

import json
import os
import subprocess
import sys

import pytest

LEAF, LEAVES = 1 << 25, 12

GRAFT = """
import re, sys
import paramend as pm

library, length, count, path = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
names = [f"w{n}" for n in range(count)]


def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024


if library == "jax":
    import jax

    place = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    jax.block_until_ready(jax.device_put(1.0, place) + 1)
    target = {name: jax.ShapeDtypeStruct((length,), "float32", sharding=place) for name in names}
else:
    import torch

    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.ones(1) + 1
    target = {name: torch.empty(length, device="meta") for name in names}
start = memory("VmRSS")
with pm.open(path) as source:
    made, _ = pm.graft(target, source)
if library == "jax":
    jax.block_until_ready(made)
print(memory("VmHWM") - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("library", ["jax", "torch"])
def test_a_graft_from_disk_needs_a_few_leaves_on_the_host(library, where, device, home, tmp_path):
    header = {
        f"w{n}": {"dtype": "F32", "shape": [LEAF // 4], "data_offsets": [n * LEAF, (n + 1) * LEAF]}
        for n in range(LEAVES)
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + LEAVES * LEAF)  # sparse: it costs no disk
    command = [sys.executable, "-c", GRAFT, library, LEAF // 4, LEAVES, path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    own = LEAVES * LEAF if where == "host" else 0  # what is made
    assert int(done.stdout) - own < 4 * LEAF
