"""Layouts: which files a rewrite makes, and what goes into each, byte by byte, before any is written."""

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.edits.plan import Plan, Row
from paramend.errors import BadArgument, Unsupported
from paramend.formats.gathered import Gathered
from paramend.formats.index import SUFFIX, index_text
from paramend.formats.registry import FOREIGN_SUFFIXES, FORMATS, Format, format_for, format_of, writable
from paramend.formats.safetensors import RECORD, Header, SafetensorsFile, layout
from paramend.formats.shards import Shards, stats_of
from paramend.formats.source import Extent
from paramend.leaves.leaves import Stored
from paramend.leaves.specs import BITS, SAFETENSORS_CODES
from paramend.reports import wording
from paramend.rewriting.files import Copy, File, Piece, with_rows


@dataclass(frozen=True, slots=True)
class Layout:
    """What a rewrite makes.

    Attributes:
        files: the files; of another format than safetensors one, without pieces.
        folder: whether they go into a directory.
        format: the format.
        left_out: files of the source that do not come along, each with the reason.
        tree: of a format that is a directory of its own, the folder in there that holds the tree; "" for all of it.
        fresh: whether the format's writer fills that folder; if not, it is a copy, and edits make new chunks for it.
        more: how many bytes come to those of the files, more or less.
    """

    files: tuple[File, ...]
    folder: bool
    format: Format
    left_out: tuple[str, ...] = ()
    tree: str = ""
    fresh: bool = False
    more: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes that will be written."""
        return self.more + sum(file.nbytes for file in self.files if not file.link)


def lay_out(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    max_shard_size: int | str | None = None,
) -> Layout:
    """The layout of a plan's outcome under a name.

    The name's suffix chooses the format; a name without one keeps the source's, file or directory.

    Raises:
        Unsupported: the format cannot hold a leaf, or cannot be written.
        RenameClash: two leaves would have one name in the file.
        BadArgument: a size that is none, or one for a single file.
    """
    source = _base(made)
    wanted = format_for(Path(out))
    own = format_of(source)
    folder = isinstance(source, Shards)
    row = wanted if wanted is not None or os.fspath(out).endswith(os.sep) or max_shard_size is not None else own
    if row is not None and row.folder:
        if max_shard_size is not None:
            raise BadArgument(f"{out}: {row.says} have no shards of a chosen size", hint="a directory: out/")
        return _own_folder(made, source, row, link=link)
    if os.fspath(out).endswith(os.sep) or max_shard_size is not None:
        if wanted is not None and not os.fspath(out).endswith(os.sep):
            raise BadArgument(
                f"{out} is the name of one file, and max_shard_size asks for several",
                hint=f"a directory: {os.fspath(out).removesuffix(Path(out).suffix)}/",
            )
        wanted, folder = FORMATS[0], True
    elif wanted is not None:
        folder = False
    if wanted is None and Path(out).suffix.lower() in FOREIGN_SUFFIXES:
        names = wording.listing([row.suffixes[0] for row in writable()])
        raise Unsupported(
            f"{out}: {Path(out).suffix} files cannot be written", hint=f"a name that ends in {names}, or a directory"
        )
    own_again = wanted is None or (wanted is own and not isinstance(source, Shards))
    again = max_shard_size is None and own_again and own not in (None, FORMATS[0]) and source is made.leaves
    if again and own is not None and (own.name == "torch" or _overlays(made)):
        return _same_files(made, own, link=link)
    if wanted is None and own is not FORMATS[0]:
        wanted = FORMATS[0] if folder or own is None else own
    if wanted is not None and not wanted.writes:
        names = wording.listing([row.suffixes[0] for row in writable()])
        raise Unsupported(
            f"{out}: {wanted.says} cannot be written", hint=f"a name that ends in {names}, or a directory"
        )
    wanted = wanted or FORMATS[0]
    if wanted.name == "safetensors":
        _check_safetensors(made)
    keeps = own in (None, FORMATS[0]) or (own is wanted and not folder and own is not None and own.name != "torch")
    lost = () if keeps else tuple(f"{key} (no tensor)" for key in source.metadata)
    if not folder:
        if wanted.name == "safetensors":
            return Layout((_file(made, "", link=link),), False, wanted, lost)
        _check_writer(made, wanted)
        nbytes = sum(_nbytes(made, row) for row in made.rows)
        return Layout((File("", nbytes, _mode(source), ()),), False, wanted, lost)
    if max_shard_size is None and isinstance(made.leaves, Shards) and own is FORMATS[0]:
        files = _same_shards(made, made.leaves, link=link)
    else:
        files = _new_shards(made, _largest(source) if max_shard_size is None else parse_size(max_shard_size))
    sidecars, left_out = _sidecars(source) if isinstance(source, Shards) else ([], [])
    if isinstance(made.leaves, Gathered):
        texts = made.leaves.texts
        sidecars = [file for file in sidecars if file.name not in texts]
        sidecars += [_text_file(name, text, _mode(source)) for name, text in texts.items()]
    return Layout((*files, *sidecars), True, wanted, (*lost, *left_out))


def _base(made: Plan) -> Any:
    """The checkpoint that the outcome takes after."""
    return made.leaves.base if isinstance(made.leaves, Gathered) else made.leaves


def _largest(source: Any) -> int | None:
    """The bytes of the tensors in the largest of several files."""
    if not isinstance(source, Shards) or len(source.files) == 1:
        return None
    filled = [0] * len(source.files)
    for number in source.index.numbers:
        filled[source.home(number)[0]] += source.nbytes(number)
    return max(filled)


def parse_size(size: int | str) -> int:
    """A number of bytes given as text, in powers of 1000, or of 1024 with an "i".

    Raises:
        BadArgument: the text is no size.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
    (5000000000, 1572864, 1000)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([kmgt])(i?))?b?", str(size).strip().lower())
    number = 0.0 if found is None else float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    if number < 1:
        raise BadArgument(f"{size!r} is no size", hint='one such as "5GB", "500MB", 1_000_000')
    return int(number)


def _check_safetensors(made: Plan) -> None:
    raw = isinstance(made.leaves, SafetensorsFile | Shards | Gathered)
    for row in made.rows:
        known = row.spec.dtype in SAFETENSORS_CODES and (not row.calls or not BITS[row.spec.dtype] % 8)
        if not known and not (raw and not row.calls and row.spec.dtype.startswith("raw<")):
            raise Unsupported(
                f"{row.path}: {row.spec.dtype} cannot be written into a safetensors file",
                hint="cast it, or delete it first",
            )


def _check_writer(made: Plan, wanted: Format) -> None:
    writer = wanted.writer()
    for row in made.rows:
        why = writer.refusal(row.spec)
        if why:
            raise Unsupported(f"{row.path} cannot be written: {why}", hint="cast it, or delete it first")


# ---- one file ----------------------------------------------------------------------------------------------


def _file(made: Plan, name: str, *, link: bool) -> File:
    """A safetensors file of all rows."""
    source: Any = made.leaves
    if isinstance(source, SafetensorsFile):
        return _edited_file(made, source, made.rows, {}, name, link=link)
    return _fresh_file(made, _aligned(made), name)


def _edited_file(
    made: Plan, file: SafetensorsFile, rows: Iterable[Row], inner: Mapping[int, int], name: str, *, link: bool
) -> File:
    """A file that keeps the header of another as far as it can: metadata, unknown fields, both orders.

    Args:
        made: the plan.
        file: the other file.
        rows: what becomes of its leaves.
        inner: the numbers of the plan as numbers in the file, where they differ.
        name: the name of the new file.
        link: whether it may be a second name of the old one.
    """
    by_place = {inner.get(row.source, row.source): row for row in rows}
    header = file.header.edited({place: (made.name(row), row.spec) for place, row in by_place.items()})
    mode = stat.S_IMODE(file.stat.st_mode)
    if header is file.header and not any(row.calls for row in by_place.values()):
        size = file.stat.st_size
        return File(name, size, mode, (Copy(file.path, 0, size),), file.path, link)
    head: Piece = Copy(file.path, 0, header.nbytes) if header is file.header else header.to_bytes()
    places = sorted(by_place)
    return File(name, header.nbytes + header.data_nbytes, mode, _pieces(made, head, (by_place[n] for n in places)))


def _fresh_file(made: Plan, rows: Iterable[Row], name: str) -> File:
    rows = list(rows)
    metadata = plain_metadata(made.leaves)
    if name:
        metadata.pop(RECORD, None)
    fields = ((made.name(row), row.spec, _nbytes(made, row)) for row in rows)
    header: Header = layout(fields, metadata or None)
    pieces = _pieces(made, header.to_bytes(), rows)
    return File(name, header.nbytes + header.data_nbytes, _mode(made.leaves), pieces)


def _pieces(made: Plan, head: Piece, rows: Iterable[Row]) -> tuple[Piece, ...]:
    """A file first byte to last. Neighbours that stay are one range, and a header that stays belongs to the first."""
    pieces = [head]
    for row in rows:
        extents = _extents(made, row)
        if extents is None:
            pieces.append(row)
            continue
        for extent in extents:
            last = pieces[-1]
            if isinstance(last, Copy) and last.path == extent.path and last.stop == extent.start:
                pieces[-1] = Copy(last.path, last.start, extent.start + extent.nbytes)
            elif extent.nbytes:
                pieces.append(Copy(extent.path, extent.start, extent.start + extent.nbytes))
    return tuple(pieces)


def set_to(row: Row) -> Stored | None:
    """The leaf of another file that the last edit of a leaf sets it to, if it does."""
    edit = row.calls[-1]
    value = edit.args.get("value")
    return value if edit.op.name == "set" and edit.index is None and isinstance(value, Stored) else None


def _extents(made: Plan, row: Row) -> list[Extent] | None:
    """Where the bytes of a leaf lie, also of one that is set to a leaf of another file; None if they are computed."""
    source: Any = made.leaves
    number = row.source
    if row.calls:
        value = set_to(row)
        if value is None:
            return None
        source, number = value.source, value.number
    if isinstance(source, Gathered):
        return source.extents(number)
    extent = source.extent(number)
    return None if extent is None else [extent]


def _aligned(made: Plan) -> list[Row]:
    """The rows in an order in which each begins aligned; those of safetensors stay as they are."""
    if format_of(_base(made)) is FORMATS[0]:
        return list(made.rows)
    return sorted(made.rows, key=lambda row: -BITS.get(row.spec.dtype, 8))


def _nbytes(made: Plan, row: Row) -> int:
    source: Any = made.leaves
    return row.spec.nbytes if row.calls or row.spec.dtype in BITS else source.nbytes(row.source)


def plain_metadata(source: Any) -> dict[str, str]:
    """The metadata of a source as far as a safetensors file can hold it: strings."""
    found = {key: value for key, value in source.metadata.items() if isinstance(key, str) and isinstance(value, str)}
    kinds = {"torch": "pt", "npz": "np", "msgpack": "flax", "orbax": "flax"}
    row = format_of(source)
    kind = None if row is None else kinds.get(row.name)
    return found if kind is None else {"format": kind, **found}  # transformers asks for it


def _mode(source: Any) -> int:
    stats = stats_of(source)
    if stats:
        return stat.S_IMODE(next(iter(stats.values())).st_mode)
    try:
        return stat.S_IMODE(Path(source.path).stat().st_mode) & 0o666
    except (OSError, AttributeError):  # a tree in memory
        return 0o666


# ---- a copy with other values --------------------------------------------------------------------------------


def _overlays(made: Plan) -> bool:
    """Whether the outcome is a copy of the source in which the bytes of some leaves are others."""
    source: Any = made.leaves
    files = getattr(source, "files", (source,))
    if made.restructured or not all(hasattr(file, "stat") for file in files):
        return False
    changed = [row for row in made.rows if row.calls]
    if any(row.spec != row.before for row in changed):
        return False
    # A new file takes any edit, and holds no more than the leaves.
    return bool(source.metadata) or all(source.extent(row.source) is not None for row in changed)


def _same_files(made: Plan, own: Format, *, link: bool) -> Layout:
    """The files of the source, each with what is left of it, and the index."""
    source: Any = made.leaves
    if not isinstance(source, Shards):
        return Layout((_again(source, [(row.source, row) for row in made.rows], "", link=link),), False, own)
    rows: list[list[tuple[int, Row]]] = [[] for _ in source.files]
    for row in made.rows:
        place, inner = source.home(row.source)
        rows[place].append((inner, row))
    files = [
        _again(file, mine, file.path.name, link=link)
        for file, mine in zip(source.files, rows, strict=True)
        if mine or not file.index.numbers
    ]
    respecified = any(row.spec != row.before for row in made.rows)
    if made.restructured or respecified:
        files += _index_file(made, source)
    elif source.shard_index is not None:
        path = source.shard_index.path
        files.append(_text_file(path.name, path.read_bytes(), _mode(source)))
    sidecars, left_out = _sidecars(source)
    return Layout((*files, *sidecars), True, own, tuple(left_out))


def _again(file: Any, rows: list[tuple[int, Row]], name: str, *, link: bool) -> File:
    """A file of the source, edited: what is no leaf stays as it is."""
    own = format_of(file)
    if own is not None and own.name == "torch":
        from paramend.rewriting import torch  # most programs have no files of torch

        if not torch.overlays(file, rows):
            return torch.torch_file(file, rows, name)
    return _overlaid_file(file, rows, name, link=link)


def _overlaid_file(file: Any, rows: Iterable[tuple[int, Row]], name: str, *, link: bool) -> File:
    """A copy of a file with the edited leaves computed where they lie. Tied leaves are one, and edited once."""
    size, mode = file.stat.st_size, stat.S_IMODE(file.stat.st_mode)
    places: dict[tuple[int, int], Row] = {}
    for number, row in rows:
        if not row.calls:
            continue
        extent = file.extent(number)
        if extent is None:
            why = "its bytes are not in a row"
            raise Unsupported(
                f"{row.path} cannot take {row.edit} in a copy of the file: {why}", hint="-o OUT.safetensors"
            )
        places[extent.start, extent.start + extent.nbytes] = row
    pieces = with_rows(file.path, 0, size, places)
    ranges = tuple(sorted((start, stop) for start, stop in places if start < stop))
    origin = None if ranges else file.path
    sealed = ranges if hasattr(file, "after_patch") else ()
    return File(name, size, mode, tuple(pieces), origin, link=link and not ranges, patched=sealed, reopen=type(file))


# ---- a directory of the format's own -------------------------------------------------------------------------


def _own_folder(made: Plan, source: Any, row: Format, *, link: bool) -> Layout:
    """A copy of a directory with other values, or a new one if leaves get other names or specs."""
    same = format_of(source) is row and source is made.leaves
    fresh = not same or made.restructured or any(each.spec != each.before for each in made.rows)
    nbytes = sum(_nbytes(made, each) for each in made.rows if fresh or each.calls)
    if fresh:
        _check_writer(made, row)
    if not same:
        lost = (
            tuple(f"{key} (no tensor)" for key in source.metadata)
            if format_of(source) not in (None, FORMATS[0])
            else ()
        )
        return Layout((), True, row, lost, fresh=True, more=nbytes)
    home, inner = source.path, source.folder.relative_to(source.path)
    files: list[File] = []
    left_out: list[str] = []
    for entry in sorted(os.scandir(home), key=lambda entry: entry.name):
        # Of the folder of a manager one step comes along, and what is said of them all.
        step = source.steps and entry.is_dir() and entry.name != "metadata" and entry.name != inner.parts[0]
        if step:
            left_out.append(f"{entry.name} (another step)" if entry.name.isdigit() else entry.name)
        else:
            _gather(home, entry.name, files, left_out, link=link)
    tree = "" if inner == Path() else inner.as_posix()
    if fresh:
        files = [file for file in files if tree and not file.name.startswith(f"{tree}/")]
    return Layout(tuple(files), True, row, tuple(left_out), tree, fresh, nbytes)


# What says which of the other files count: a second name of it could not be exchanged.
_OWN = re.compile(r"_.*|\..*|manifest\..*|zarr\.json")


def _gather(home: Path, name: str, files: list[File], left_out: list[str], *, link: bool) -> None:
    """Adds a file, or those of a directory, hidden ones too: some stores have them."""
    path = home / name
    if path.name == ".undo" or path.name.endswith(".orbax-checkpoint-tmp"):
        return
    if path.is_symlink() and not (path.is_file() and _is_of_hub_cache(home, path)):
        left_out.append(f"{name} (a symbolic link)")
    elif path.is_dir():
        for inner in sorted(path.iterdir()):
            _gather(home, f"{name}/{inner.name}", files, left_out, link=link)
    elif path.is_file():
        status = path.stat()
        copy = (Copy(path, 0, status.st_size),) if status.st_size else ()
        linked = link and _OWN.fullmatch(path.name) is None
        files.append(File(name, status.st_size, stat.S_IMODE(status.st_mode), copy, path, linked))
    else:
        left_out.append(f"{name} (no regular file)")


# ---- several files -----------------------------------------------------------------------------------------


def _same_shards(made: Plan, source: Shards, *, link: bool) -> list[File]:
    """The shards of the source, each with what is left of it, and the index."""
    rows: list[list[Row]] = [[] for _ in source.files]
    for row in made.rows:
        rows[source.home(row.source)[0]].append(row)
    files = []
    for file, mine in zip(source.files, rows, strict=True):
        assert isinstance(file, SafetensorsFile)
        if mine or not file.header.entries:
            inner = {row.source: source.home(row.source)[1] for row in mine}
            files.append(_edited_file(made, file, mine, inner, file.path.name, link=link))
    return files + _index_file(made, source)


def _index_file(made: Plan, source: Shards) -> list[File]:
    """The index of the source, true of what is left; none if there was none."""
    if source.shard_index is None:
        return []
    index, ties = made.leaves.index, source.ties
    weight_map = {}
    order = {name: place for place, name in enumerate(source.shard_index.weight_map)}
    for row in sorted(made.rows, key=lambda row: order.get(index.name(row.source), len(order))):
        if index.name(row.source) in order:
            weight_map[made.name(row)] = source.files[source.home(row.source)[0]].path.name
    once = {ties.get(row.source, row.source): row for row in made.rows}.values()
    nbytes, size = sum(_nbytes(made, row) for row in once), sum(row.spec.size for row in once)
    text = source.shard_index.to_bytes(weight_map, nbytes=nbytes, size=size)
    return [_text_file(source.shard_index.path.name, text, _mode(source))]


def _new_shards(made: Plan, limit: int | None) -> list[File]:
    """As many files as the limit asks for, and their index if there are several."""
    groups: list[list[Row]] = [[]]
    filled = 0
    for row in _aligned(made):
        nbytes = _nbytes(made, row)
        if limit is not None and groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += nbytes
    if len(groups) == 1:
        return [_fresh_file(made, groups[0], "model.safetensors")]
    files: list[File] = []
    weight_map: dict[str, str] = {}
    for place, group in enumerate(groups, 1):
        name = f"model-{place:05}-of-{len(groups):05}.safetensors"
        files.append(_fresh_file(made, group, name))
        for row in group:
            if weight_map.setdefault(made.name(row), name) != name:
                layout(((made.name(row), row.spec, 0) for row in made.rows), None)  # says which name stands twice
    table = {"metadata": {"total_size": sum(_nbytes(made, row) for row in made.rows)}, "weight_map": weight_map}
    files.append(_text_file("model.safetensors" + SUFFIX, index_text(table), _mode(made.leaves)))
    return files


def _text_file(name: str, text: bytes, mode: int) -> File:
    return File(name, len(text), mode, (text,))


# ---- sidecars ----------------------------------------------------------------------------------------------

# Weights of the same model in another form would contradict the edited ones.
_OTHER_WEIGHTS = re.compile(
    r"(?:pytorch_model|tf_model|flax_model|rust_model|model|consolidated|diffusion_pytorch_model|adapter_model)"
    r"[-_.0-9a-z]*\.(?:bin|pt|pth|h5|msgpack|ot|gguf|onnx|npz|ckpt)",
    re.IGNORECASE,
)


def _sidecars(source: Shards) -> tuple[list[File], list[str]]:
    """The files beside the weights, and what of the directory is left out."""
    files: list[File] = []
    left_out: list[str] = []
    weights = {file.path.name for file in source.files}
    if source.shard_index is not None:
        weights.add(source.shard_index.path.name)
    for name in sorted(path.name for path in source.folder.iterdir()):
        if name in weights or name.startswith("."):
            continue
        other = name.endswith((".safetensors", SUFFIX)) or _OTHER_WEIGHTS.fullmatch(name)
        if other:
            left_out.append(f"{name} (other weights)")
        else:
            _collect(source.folder, name, files, left_out)
    return files, left_out


def _collect(folder: Path, name: str, files: list[File], left_out: list[str]) -> None:
    path = folder / name
    try:
        if path.is_symlink() and not _is_of_hub_cache(folder, path):
            left_out.append(f"{name} (a symbolic link)")
            return
        status = path.stat()
    except OSError:
        left_out.append(f"{name} (it cannot be read)")
        return
    if stat.S_ISDIR(status.st_mode) and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                _collect(folder, f"{name}/{inner.name}", files, left_out)
    elif stat.S_ISREG(status.st_mode):
        copy = (Copy(path, 0, status.st_size),) if status.st_size else ()
        files.append(File(name, status.st_size, stat.S_IMODE(status.st_mode), copy, path))
    else:
        left_out.append(f"{name} (no regular file)")


def _is_of_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a symbolic link stays with the model: within the directory, or in the blobs of a hub cache beside it.

    Any other may lead to what nobody meant to copy.
    """
    real, home = path.resolve(), folder.resolve()
    return real.is_relative_to(home) or real.parent == home.parent.parent / "blobs"
