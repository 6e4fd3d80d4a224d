import paramend as pm

with pm.open("fp8") as model:
    pm.at(model, "model.layers.0.self_attn.q_proj.weight")[:64].multiply(2).save("out")
