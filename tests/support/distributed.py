"""Distributed checkpoints of torch: written with its own classes in one process, or by gloo processes that save."""

import io
import os
import pickle

import torch
from torch.distributed.checkpoint import filesystem, metadata as classes


def tensors():
    """Tensors and how they are cut: the boxes of their chunks, as (offsets, sizes)."""
    rows, columns = [((0, 0), (3, 4)), ((3, 0), (3, 4))], [((0, 0), (4, 3)), ((0, 3), (4, 2))]
    grid = [((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)]
    uneven = [((0, 0), (2, 1)), ((2, 0), (1, 1)), ((3, 0), (0, 1))]
    return {
        "model.rows.weight": (torch.arange(24.0).reshape(6, 4), rows),
        "model.cols.weight": (torch.arange(20.0).reshape(4, 5), columns),
        "model.grid": (torch.arange(24, dtype=torch.int16).reshape(4, 6), grid),
        "model.uneven": (torch.arange(3.0).reshape(3, 1), uneven),
        "model.half": (torch.arange(4).to(torch.bfloat16), None),
        "model.scalar": (torch.tensor(2.5), None),
        "model.empty": (torch.zeros(0, 3), None),
        "optim.state.0.exp_avg": (torch.arange(24.0).reshape(6, 4) + 100, rows),
    }


OBJECTS = {"optim.param_groups.0.lr": 0.1, "app.epoch": 3}
PATHS = {
    "model.rows.weight": ("model", "rows.weight"),
    "model.cols.weight": ("model", "cols.weight"),
    "optim.state.0.exp_avg": ("optim", "state", "0", "exp_avg"),
    "optim.param_groups.0.lr": ("optim", "param_groups", 0, "lr"),
    "app.epoch": ("app", "epoch"),
} | {f"model.{name}": ("model", name) for name in ("grid", "uneven", "half", "scalar", "empty")}


def write(folder, tensors=None, objects=OBJECTS, change=lambda metadata: None):
    """A checkpoint; chunk n of each tensor is what rank n wrote. `change` edits the metadata before it is pickled."""
    folder.mkdir()
    files, found, storage = {}, {}, {}

    def item(rank, value, index):
        stream = files.setdefault(rank, io.BytesIO())
        start = stream.tell()
        data = io.BytesIO()
        torch.save(value, data)
        stream.write(data.getvalue())
        storage[index] = filesystem._StorageInfo(f"__{rank}_0.distcp", start, stream.tell() - start)

    for name, value in objects.items():
        found[name] = classes.BytesStorageMetadata()
        item(1, value, classes.MetadataIndex(name))
    for name, (tensor, boxes) in (tensors or globals()["tensors"]()).items():
        chunks = []
        for rank, (offsets, sizes) in enumerate(boxes or [((0,) * tensor.ndim, tensor.shape)]):
            chunks.append(classes.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            part = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].clone()
            item(rank, part, classes.MetadataIndex(name, torch.Size(offsets), rank))
        properties = classes.TensorProperties(tensor.dtype)
        found[name] = classes.TensorStorageMetadata(properties, tensor.shape, chunks)
    paths = {name: PATHS[name] for name in found if name in PATHS} or None
    metadata = classes.Metadata(found, paths, storage, classes.StorageMeta(folder, "an id"), "1.0.0")
    change(metadata)
    for rank, stream in files.items():
        (folder / f"__{rank}_0.distcp").write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def loaded(folder, tmp):
    """What torch makes of a checkpoint: nested, with objects."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, tmp / "whole.pt")
    return torch.load(tmp / "whole.pt", weights_only=False)


# ---- several processes ---------------------------------------------------------------------------------------------


def in_ranks(job, count, folder, *arguments):
    """Run a function of this module in processes that make up a mesh."""
    import torch.multiprocessing as processes

    meeting = folder.parent / f"meeting-{job}-{count}-{folder.name}"
    processes.spawn(_rank, (job, count, str(meeting), str(folder), *arguments), nprocs=count)


def _rank(rank, job, count, meeting, folder, *arguments):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    globals()[job](init_device_mesh("cpu", (count,)), folder, *arguments)
    dist.destroy_process_group()


def spread(mesh):
    """The same state on any mesh: by rows, by columns, replicated, whole; an optimizer's state and objects."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def on(tensor, how):
        return distribute_tensor(tensor, mesh, [how])

    model = {
        "rows.weight": on(torch.arange(24.0).reshape(6, 4), Shard(0)),
        "cols.weight": on(torch.arange(20.0).reshape(4, 5), Shard(1)),
        "uneven": on(torch.arange(3.0).reshape(3, 1), Shard(0)),
        "one": on(torch.arange(1.0), Shard(0)),
        "shared": on(torch.arange(4).to(torch.bfloat16), Replicate()),
        "plain": torch.ones(3, dtype=torch.int64),
        "layer._extra_state": torch.tensor([1, 2], dtype=torch.uint8),
    }
    moments = {"step": torch.tensor(1.0), "exp_avg": on(torch.arange(24.0).reshape(6, 4) + 100, Shard(0))}
    return {"model": model, "optim": {"state": {0: moments}, "param_groups": [{"lr": 0.1}]}, "note": "hello"}


def save_spread(mesh, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(spread(mesh), checkpoint_id=folder)


def save_hugging_face(mesh, folder):
    import torch.distributed.checkpoint as dcp

    model = spread(mesh)["model"]
    places = {name: 1 + at % 2 for at, name in enumerate(model)}
    writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True, fqn_to_index_mapping=places)
    dcp.save(model, storage_writer=writer)


def check_spread(mesh, folder, names, factors):
    """Load checkpoints in a folder into zeros on this mesh: tensors of these names, old → new, times a factor."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    def whole(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    model = spread(mesh)["model"]
    for name, factor in factors.items():
        state = {"model": {new: torch.zeros_like(model[old]) for old, new in names.items()}}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        for old, new in names.items():
            assert torch.equal(whole(state["model"][new]), whole(model[old]) * factor), (name, new)
