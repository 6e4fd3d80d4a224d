"""Arguments of another kind: each refusal says what was given and what to pass."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import torch

import paramend as pm
from paramend.errors import BadArgument, GraftRefused, Unsupported

TREE = {"w": np.ones(2)}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"unused": True}, 'unused="ok", or "error", the default'),
        ({"unused": "ignore"}, 'unused="ok", or "error", the default'),
        ({"unused": "eror"}, 'unused="error"'),
        ({"mismatch": "skip"}, 'mismatch="keep", or "error", the default'),
        ({"mismatch": True}, 'mismatch="keep", or "error", the default'),
        ({"mismatch": {"w": "ignore"}}, 'mismatch="keep", or "error", the default'),
        ({"mismatch": "crop"}, 'mismatch="overlap", or "error", the default'),
        ({"mismatch": "interpolate"}, 'mismatch="resize", or "error", the default'),
        ({"missing": "ignore"}, 'missing="fresh", the default'),
        ({"dtype": "float32"}, 'dtype="target" casts to that of your model'),
        ({"dtype": np.float32}, 'dtype="target" casts to that of your model'),
    ],
)
def test_options_as_other_libraries_call_them(option, hint):
    (name,) = option
    with pytest.raises(BadArgument, match=f"{name}=.* is not one of") as caught:
        pm.graft(TREE, TREE, **option)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("wrong", "said", "hint"),
    [
        (Model(), "Model, which holds no parameters", "pass its parameters: params = model.init(key, x)"),
        (Model, "the class ", "pass an instance of it"),
        ("old.safetensors", "a path, and nothing was opened", 'pass pm.open("old.safetensors")'),
        (optax.adam(0.1), "an optax transformation", "pass its state: tx.init(params)"),
        (None, "None", "pass a tree of arrays"),
        (len, "a builtin_function_or_method", "pass a tree of arrays"),
    ],
)
def test_something_else_for_a_tree(wrong, said, hint):
    for verb, arguments in ((pm.graft, (TREE, wrong)), (pm.graft, (wrong, TREE)), (pm.graft_, (TREE, wrong))):
        with pytest.raises(BadArgument) as caught:
            verb(*arguments)
        whose = "the source" if arguments[1] is wrong else "your model"
        assert str(caught.value).startswith(f"{whose} holds no arrays: it is ") and said in str(caught.value)
        assert caught.value.hint.startswith(hint)
    with pytest.raises(Unsupported, match="there is nothing to freeze in") as caught:
        pm.freeze(optax.sgd(0.1), "**").init(wrong)
    assert caught.value.hint.startswith(hint)


def test_arguments_in_the_other_order(tmp_path):
    tx = optax.adam(0.1)
    state = tx.init({"w": jax.numpy.ones(2)})
    for arguments in ((tx, state), (state, tx)):
        with pytest.raises(Unsupported, match="an optax transformation, which holds no state") as caught:
            pm.graft_opt_state(*arguments)
        assert caught.value.hint == "pass its state: tx.init(params)"
    pm.save({"weight": np.ones((2, 2), "f4")}, tmp_path / "x.safetensors")
    module = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(Unsupported) as caught:
        pm.graft_(pm.open(tmp_path / "x.safetensors"), module)
    assert caught.value.hint == "pm.graft_(module, checkpoint): the model first"
    with pytest.raises(GraftRefused) as caught:
        pm.graft(TREE, {"w": jax.ShapeDtypeStruct((2,), "float32")})
    assert caught.value.hint.startswith("pm.graft(target, source): first the model that starts warm")
    with pytest.raises(Unsupported) as caught:
        pm.freeze_("**", module)
    assert caught.value.hint == "pm.freeze_(module, selector): the module first"
