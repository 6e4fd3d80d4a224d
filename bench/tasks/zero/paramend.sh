paramend zero model 'model.layers[-1].mlp.down_proj.weight' -o out
