import json
from pathlib import Path

with Path("large.safetensors").open("r+b") as file:
    length = int.from_bytes(file.read(8), "little")
    begin, end = json.loads(file.read(length))["lm_head.weight"]["data_offsets"]
    file.seek(8 + length + begin)
    file.write(bytes(end - begin))
