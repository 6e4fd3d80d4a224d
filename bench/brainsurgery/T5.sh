paramend fold inputs/base inputs/lora -o folded
paramend convert folded out --max-shard-size 512MiB
