paramend delete inputs/base 'h.*.attn.bias' -o without
paramend cast without '**' float32 -o floats
paramend cast floats 'h.*.{attn,mlp}.*.weight' bfloat16 -o mixed
paramend convert mixed out --max-shard-size 256MiB
