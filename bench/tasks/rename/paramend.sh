paramend rename model 'model.**' 'decoder.**' -o out
