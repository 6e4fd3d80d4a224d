"""What goes into an edited file of `torch.save`, byte by byte: storages that stay are copied, everything else is kept.

Dicts, lists, numbers, attributes and parameters stay as they are; so do storages that several tensors view. A leaf
that changes in more than its values, or that shares bytes with another, gets a separate storage.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from paramend.edits.plan import Row
from paramend.edits.structure import relocate
from paramend.errors import Unsupported
from paramend.formats.torch.source import TorchFile
from paramend.formats.torch.writer import TorchWriter, pickled, retargeted
from paramend.formats.zips import ALIGNMENT, ZipHeaders
from paramend.leaves.leaves import keys_of
from paramend.rewriting.files import Computed, File, Piece, with_rows
from paramend.trees.tree import Tree

_Rows = Sequence[tuple[int, Row]]
_Places = Mapping[tuple[int, int], Row]


def overlays(file: TorchFile, rows: _Rows) -> bool:
    """Whether a copy of the file suffices that differs only in the bytes of some leaves; (number in it, row) of all."""
    there = {number for number, _ in rows}
    stay = all(not row.was and _stays(file, number, row, there) for number, row in rows)
    return stay and len(there) == len(file.tensors)


def _stays(file: TorchFile, number: int, row: Row, there: Collection[int]) -> bool:
    if not row.calls:
        return True
    alone = row.spec == row.before and file.extent(number) is not None
    return alone and not any(other in there for other in file.overlaps(number))


def torch_file(file: TorchFile, rows: _Rows, name: str) -> File:
    """The file with the leaves of some rows edited, moved or deleted; `Unsupported` if torch cannot hold the result."""
    structure, calls = file.recorded()
    fresh: dict[str, tuple[str, Row]] = {}  # the key of a new storage → the member that it comes after, its leaf
    inside: dict[str, dict[tuple[int, int], Row]] = {}  # a member → what changes within it
    key_of: dict[int, str] = {}
    start = f"{file.folder}/data/"
    taken = {member.removeprefix(start) for member in file.archive.members if member.startswith(start)}
    keys = (key for key in map(str, range(1 << 62)) if key not in taken)
    there = {number for number, _ in rows}
    for number, row in rows:
        member, extent = file.member(number), file.extent(number)
        if not row.calls or member is None:
            continue
        if _stays(file, number, row, there):
            if extent is not None and extent.nbytes:
                inside.setdefault(member.name, {})[extent.start, extent.start + extent.nbytes] = row
            continue
        why = TorchWriter().refusal(row.spec)
        if why:
            raise Unsupported(f"{row.path} cannot be written: {why}", hint="cast it, or delete it first")
        one = file.ties.get(number, number)
        if one not in key_of:
            key_of[one] = next(keys)
            fresh[key_of[one]] = (member.name, row)
        calls[number] = retargeted(calls[number], row.spec, key_of[one])
    used: set[str] = set()
    data = pickled(_relocated(structure, len(calls), rows), dict(enumerate(calls)), used=used)
    pieces, patched, nbytes = _zipped(file, data, used, fresh, inside)
    return File(name, nbytes, tuple(pieces), patched=tuple(patched), reopen=TorchFile)


def _relocated(structure: Any, count: int, rows: _Rows) -> Any:
    """The structure without leaves that have no row, and with the others at the places in their rows."""
    gone = set(range(count)) - {number for number, _ in rows}
    moved = {number: list(zip(keys_of(row.labels), row.depths, strict=True)) for number, row in rows if row.was}
    if not gone and not moved:
        return structure
    tree = Tree(structure)
    # The tree numbers all its values, leaves or not; the array of a leaf holds its number in the file.
    own = {int(tree.read(number)): number for number in tree.index.numbers}
    paths = {own[number]: path for number, path in moved.items()}
    return relocate(tree, paths, [own[number] for number in sorted(gone)])


def _zipped(
    file: TorchFile, data: bytes, used: set[str], fresh: Mapping[str, tuple[str, Row]], inside: Mapping[str, _Places]
) -> tuple[list[Piece], list[tuple[int, int]], int]:
    """The pieces of the zip, the ranges whose checksums are not yet correct, and the length."""
    archive, start = file.archive, f"{file.folder}/data/"
    zipped = ZipHeaders(_alignment(file))
    pieces: list[Piece] = []
    patched: list[tuple[int, int]] = []
    followers: dict[str, list[tuple[str, Row]]] = {}
    for key, (after, row) in fresh.items():
        if key in used:
            followers.setdefault(after, []).append((key, row))
    for member in archive.members.values():
        if member.name == f"{file.folder}/data.pkl":
            pieces += zipped.member(member.name, data)
        elif not member.name.startswith(start) or member.name[len(start) :] in used:
            places = inside.get(member.name, {})
            crc = 0 if places else member.crc
            pieces.append(zipped.open(member.name, member.nbytes, crc))
            first = archive.offsets(member.name).start
            pieces += with_rows(file.path, first, first + member.nbytes, places)
            patched += [(zipped.at + a - first, zipped.at + b - first) for a, b in places]
            pieces.append(zipped.close())
        for key, row in followers.get(member.name, ()):
            nbytes = row.spec.nbytes
            pieces += [zipped.open(f"{start}{key}", nbytes), Computed(row, 0, nbytes)]
            patched += [(zipped.at, zipped.at + nbytes)] if nbytes else []
            pieces.append(zipped.close())
    pieces.append(zipped.finish())
    return [piece for piece in pieces if piece != b""], sorted(patched), zipped.at


def _alignment(file: TorchFile) -> int:
    """The alignment of members, which newer versions of torch store in the file."""
    member = file.archive.members.get(f"{file.folder}/.storage_alignment")
    text = file.archive.read(member.name) if member is not None and member.nbytes < 8 else b""
    number = int(text) if text.isdigit() else 0
    return number if 0 < number <= 1 << 15 and not number & (number - 1) else ALIGNMENT
