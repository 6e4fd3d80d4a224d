"""What the configuration beside the weights says of their quantisation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramend.anatomy.sections import config_beside

# Files in the order in which they count, and the keys below which they say it; () is the file itself.
_FILES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config.json", ("quantization_config", "compression_config", "quantization")),
    ("quantize_config.json", ()),
    ("quant_config.json", ()),
    ("hf_quant_config.json", ("quantization",)),
)


def quantization_of(path: Path) -> Mapping[str, object] | None:
    """The part of a configuration that tells how weights are quantised, or None. A damaged one tells nothing here.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "fp8"}}}')
    >>> quantization_of(folder), quantization_of(folder / "model.safetensors")
    ({'quant_method': 'fp8'}, {'quant_method': 'fp8'})
    """
    found = (_part(config_beside(path, name), keys) for name, keys in _FILES)
    return next((part for part in found if part), None)


def _part(data: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Any] | None:
    """What lies below one of the keys, in the data itself or in the configuration of its text model."""
    if not keys:
        return data
    for part in (data, data.get("text_config")):
        for key in keys:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping):
                return part[key]  # type: ignore[no-any-return]
    return None
