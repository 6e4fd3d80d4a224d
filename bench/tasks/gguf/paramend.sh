paramend config model.gguf --set general.name='A much longer name' -o out.gguf
