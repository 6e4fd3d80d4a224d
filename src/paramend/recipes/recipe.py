"""`Recipe`: edits as data, applied to any tree."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.disk.urls import Url, path_of
from paramend.errors import BadCheckpoint, BadRecipe, CannotRead, Problem, Unsupported
from paramend.formats.files import open_bytes
from paramend.formats.gathered import Gathered
from paramend.leaves.specs import AnyTree
from paramend.recipes.donors import Donors
from paramend.recipes.run import check_in_place, run
from paramend.recipes.steps import VERSION, Problems, parse_steps
from paramend.recipes.text import MAX_BYTES, MAX_PROBLEMS, Document, read, write_scalar
from paramend.recipes.verbs import make_schema

T = TypeVar("T")


class Recipe:
    """Edits as data: steps that run in order, each on the tree that the previous steps left.

    `str(recipe)` is the recipe as YAML, which parses to an equal recipe. Nothing in a recipe can run code.

    Args:
        steps: maps of one key each, as listed in `docs/recipes.md`.
        version: the version of the format; there is one.
        raw: whether leaves are taken as they are stored, also the codes and scales of quantised weights.

    Raises:
        BadRecipe: keys or values are wrong; `problems` lists them all, each with its address.

    >>> recipe = Recipe([{"zero": "head/bias"}, {"fill": {"at": "**/kernel", "value": 0.5}}])
    >>> recipe.apply({"head": {"kernel": np.zeros(2), "bias": np.ones(1)}})
    {'head': {'kernel': array([0.5, 0.5]), 'bias': array([0.])}}
    >>> print(recipe)
    version: 1
    steps:
      - zero: "head/bias"
      - fill: {at: "**/kernel", value: 0.5}
    """

    def __init__(self, steps: Sequence[Mapping[str, object]], *, version: int = VERSION, raw: bool = False) -> None:
        self._read(Document({"version": version, "raw": raw, "steps": steps}), "recipe", Path())

    def _read(self, document: Document, name: str, folder: Path) -> None:
        problems = Problems(document.problems)
        self._steps = parse_steps(document.data, problems)
        self._raw = isinstance(document.data, Mapping) and document.data.get("raw") is True
        self._name, self._folder, self._lines = name, folder, document.lines
        self._flaws: Sequence[Problem] = problems
        self._refuse(problems)

    @classmethod
    def apply_file(cls, path: str | os.PathLike[str], tree: T) -> T:
        """The tree with the recipe of a file applied: `Recipe.load(path).apply(tree)`, except that problems of the
        recipe and of its fit to the tree are reported together.

        Raises:
            CannotRead: there is no such file.
            BadRecipe: something is wrong; nothing was changed.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "fix.yaml")
        >>> _ = path.write_text("version: 1\\nsteps: [zeroo: w, zero: v]")
        >>> Recipe.apply_file(path, {"w": np.ones(1)})
        Traceback (most recent call last):
        paramend.errors.BadRecipe: fix.yaml: 2 problems
        <BLANKLINE>
        $.steps[0].zeroo (line 2): there is no step 'zeroo'
            hint: did you mean zero?
        $.steps[1].at (line 2): "v" matches none of 1 leaf
            hint: this tree has "w"
        """
        try:
            return cls.load(path).apply(tree)
        except BadRecipe as error:
            partial = error.recipe
            if not isinstance(partial, Recipe) or not partial._flaws:
                raise
            problems = partial._run(tree)[1]
            every = [*partial._flaws, *problems]
            partial._refuse(sorted(every, key=lambda problem: problem.line or partial._line(problem.address)))
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """The recipe in a YAML or JSON file. Files that it names are relative to its folder.

        Raises:
            CannotRead: there is no such file.
            BadRecipe: it is not a recipe; `problems` lists all that is wrong, each with its address and line.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "fix.yaml")
        >>> _ = path.write_text("version: 1\\nsteps:\\n  - zero: '**/bias'\\n")
        >>> Recipe.load(path)
        <fix.yaml: 1 step>
        """
        path = path_of(path)
        return cls._of(document_at(path), path.name, path.parent)

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """The recipe in a YAML or JSON text. Files that it names are relative to the current folder.

        Raises:
            BadRecipe: it is not a recipe; `problems` lists all that is wrong, each with its address and line.

        >>> Recipe.parse('{"version": 1, "steps": [{"zero": "w"}]}') == Recipe([{"zero": "w"}])
        True
        >>> Recipe.parse("version: 1\\nsteps: [zeroo: w]")
        Traceback (most recent call last):
        paramend.errors.BadRecipe: recipe: 1 problem
        <BLANKLINE>
        $.steps[0].zeroo (line 2): there is no step 'zeroo'
            hint: did you mean zero?
        """
        return cls._of(read(text, "recipe"), "recipe", Path())

    @classmethod
    def _of(cls, document: Document, name: str, folder: Path) -> "Recipe":
        new = cls.__new__(cls)
        new._read(document, name, folder)
        return new

    @staticmethod
    def schema() -> dict[str, Any]:
        """The JSON Schema (2020-12) of recipes, for editors and other programs.

        >>> sorted(Recipe.schema()["properties"])
        ['raw', 'steps', 'version']
        """
        return make_schema()

    def apply(self, tree: T) -> T:
        """A new tree of the same type with all steps applied; the given tree stays as it is.

        For an opened checkpoint, the checkpoint with a longer plan, for `.save(out)`; `pm.patch(path, recipe.apply)`
        applies the recipe in place.

        Args:
            tree: anything that `pm.at` takes.

        Raises:
            BadRecipe: steps do not fit the tree; all of them are listed, and nothing was changed.

        >>> Recipe([{"rename": {"at": "a/w", "to": "b/w"}}, {"zero": "b/w"}]).apply({"a": {"w": np.ones(1)}})
        {'b': {'w': array([0.])}}
        """
        if isinstance(tree, str | os.PathLike):
            raise Unsupported(f"{str(tree)!r} is a path, not a tree", hint="recipe.apply(pm.open(path)).save(out)")
        found, problems = self._run(tree)
        self._refuse(problems)
        if isinstance(found, Checkpoint) and isinstance(tree, Checkpoint):
            made = isinstance(tree.source, Gathered)  # of other leaves, of which the recipe says nothing
            alone = not (made or tree.plan.changed or tree.plan.deleted or tree.texts)
            told = self._told(path_of(tree.path), raw=self._raw or tree.raw) if alone else ""
            found = found.planned(found.plan, told).as_stored(tree.raw)
        return found  # type: ignore[no-any-return]

    def apply_(self, module: AnyTree) -> None:
        """Apply all steps in place to a torch or NNX module. Everything is checked before the first change.

        Args:
            module: anything that the verbs of `pm.at` that end in `_` take.

        Raises:
            BadRecipe: steps do not fit, or change shapes, dtypes or structure; nothing was changed.

        >>> tree = {"w": np.ones(2)}
        >>> Recipe([{"fill": {"at": "w", "index": -1, "value": 5}}]).apply_(tree)
        >>> tree
        {'w': array([1., 5.])}
        """
        if isinstance(module, Checkpoint):
            raise Unsupported(
                "apply_ cannot edit an opened checkpoint in place", hint=module.patched_by.format("recipe.apply(tree)")
            )
        work, problems = check_in_place(self._steps, module, Donors(self._folder, raw=self._raw), raw=self._raw)
        self._refuse(problems)
        for carry_out in work:
            carry_out()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as data: `Recipe(**recipe.to_dict())` equals it."""
        raw = {"raw": True} if self._raw else {}
        return {"version": VERSION, **raw, "steps": [step.to_dict() for step in self._steps]}

    def _run(self, tree: Any) -> tuple[Any, list[Problem]]:
        raw = self._raw or getattr(tree, "raw", False) is True
        return run(self._steps, tree, Donors(self._folder, raw=raw), raw=raw)

    def _told(self, edited: Path, *, raw: bool) -> str:
        """The recipe as a record stores it: files as seen from the checkpoint, without the folders of this machine."""
        home = edited.absolute().parent

        def said(name: Any) -> Any:
            if isinstance(name, list):
                return list(map(said, name))
            path = Donors(self._folder).place(name)
            path = path if isinstance(path, Url) or path.exists() else home / name
            if isinstance(path, Url) or isinstance(home, Url):
                return str(path) if isinstance(path, Url) else path.name
            near = os.path.relpath(path, home)
            return near if Path(near).parts.count("..") < 2 else path.name

        steps = self.to_dict()["steps"]
        for body in (body for step in steps for body in step.values() if isinstance(body, dict)):
            body |= {key: said(body[key]) for key in ("from", "source", "base") if key in body}
        return str(Recipe(steps, raw=raw))

    def _refuse(self, problems: Sequence[Problem]) -> None:
        if problems:
            lines = [problem.line or self._line(problem.address) for problem in problems]
            found = [problem._replace(line=line) for problem, line in zip(problems, lines, strict=True)][:MAX_PROBLEMS]
            if len(problems) >= MAX_PROBLEMS:
                found.append(Problem("$", f"these are the first {MAX_PROBLEMS} problems; there may be more"))
            raise BadRecipe(self._name, found, recipe=self)

    def _line(self, address: str) -> int:
        while address and address not in self._lines:
            address = address[: max(address.rfind("."), address.rfind("["))] if len(address) > 1 else ""
        return self._lines.get(address, 0)

    def __str__(self) -> str:
        steps = (f"  - {verb}: {write_scalar(body)}" for step in self._steps for verb, body in step.to_dict().items())
        return "\n".join([f"version: {VERSION}", *(["raw: true"] if self._raw else []), "steps:", *steps])

    def __repr__(self) -> str:
        return f"<{self._name}: {len(self._steps)} step{'' if len(self._steps) == 1 else 's'}>"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))


def document_at(path: Path) -> Document:
    """What a YAML or JSON file holds; `BadRecipe` if it is neither, `CannotRead` if there is none."""
    try:
        return read(_bytes_of(path).decode("utf-8-sig"), path.name)
    except UnicodeDecodeError as error:
        raise BadRecipe(path.name, [Problem("$", f"byte {error.start}: the text is not UTF-8")]) from None


def _bytes_of(path: Path) -> bytes:
    try:
        with open_bytes(path) as file:
            data = file.read(MAX_BYTES + 1)
    except BadCheckpoint as error:
        raise CannotRead(str(error)) from None
    if len(data) > MAX_BYTES:
        raise BadRecipe(path.name, [Problem("$", f"a recipe has at most {MAX_BYTES:,} bytes, and this has too many")])
    return data
