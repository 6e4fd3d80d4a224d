sft rename model/model.safetensors --sub '^model\.' 'decoder.' -o out.safetensors
