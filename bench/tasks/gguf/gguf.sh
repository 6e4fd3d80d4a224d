gguf-new-metadata model.gguf out.gguf --general-name 'A much longer name'
