"""Frozen parameters under FSDP2: two gloo processes on CPU."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import pytest

PROGRAM = dedent(
    """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from paramend.freezing.freeze import freeze_, unfreeze_

    rank, file, when = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if when == "before":
        freeze_(model, "0.*")
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def full():
        return {name: p.full_tensor().detach().clone() for name, p in model.state_dict().items()}

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 4) * (rank + 1)).pow(2).sum().backward()
        optimizer.step()

    if when == "midrun":
        step()
        freeze_(model, "0.*", optimizer=optimizer)
    start = full()
    for _ in range(3):
        step()
    end = full()
    moved = sorted(name for name in end if not torch.equal(start[name], end[name]))
    assert moved == ["2.bias", "2.weight"], moved
    unfreeze_(model, "0.*")
    step()
    later = full()
    assert all(not torch.equal(later[name], end[name]) for name in end)
    dist.barrier()
    dist.destroy_process_group()
    print("moved", *moved)
    """
)


@pytest.mark.far
@pytest.mark.parametrize("when", ["before", "midrun"])
def test_two_processes(when, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                subprocess.run,
                [*command, str(rank), str(tmp_path / "meeting"), when],
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            for rank in range(2)
        ]
    for done in (run.result() for run in runs):
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["moved", "2.bias", "2.weight"]
