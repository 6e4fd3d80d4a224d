mergekit-extract-lora --model ./tuned/ --base-model ./model/ --out-path out --max-rank 8 --include-regex q_proj
