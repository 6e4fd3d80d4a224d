"""Uses an installed Paramend with numpy alone, in an empty folder: what is imported, and an edit, in place and back."""

import sys
from pathlib import Path

import numpy as np

import paramend as pm

FRAMEWORKS = {"jax", "flax", "optax", "orbax", "torch", "ray", "equinox", "transformers", "rich", "click", "jinja2"}

assert "site-packages" in pm.__file__, pm.__file__
loaded = FRAMEWORKS & {name.partition(".")[0] for name in sys.modules}
assert not loaded, f"`import paramend` imports {loaded}"
assert (Path(pm.__file__).parent / "py.typed").is_file()

file = Path("model.safetensors")
tree = {"layers": [{"kernel": np.full((2, 3), n + 1.0, "float32"), "bias": np.ones(3, "float32")} for n in range(3)]}
pm.save(tree, file)
before = file.read_bytes()

pm.at(pm.open(file), "layers[-1]/kernel").zero().save("edited.safetensors")
assert pm.verify(file, "edited.safetensors", only="layers[-1]/*") == ["layers/2/kernel"]
assert not pm.load("edited.safetensors")["layers"]["2"]["kernel"].any()

pm.patch(file, lambda t: pm.at(t, "**/bias").fill(0.5))
assert file.read_bytes() != before
pm.undo(file)
assert file.read_bytes() == before

page = pm.diff(file, "edited.safetensors").to_html()
assert page.startswith("<!doctype html>") and "layers/2/kernel" in page
