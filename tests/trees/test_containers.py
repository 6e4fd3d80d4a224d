"""The same selectors and edits over every container: the same containers come back, and the same untouched leaves."""

import collections
import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.training.train_state import TrainState

import paramend as pm
from paramend.errors import BadArgument, NoMatch, Unsupported

KEY = jax.random.key(0)


def ones(*shape):
    return jnp.ones(shape)


def params():
    return {
        "params": {
            "Dense_0": {"kernel": ones(2, 3), "bias": ones(3)},
            "Dense_1": {"kernel": ones(3, 1), "bias": ones(1)},
        }
    }


# ---- the containers


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Layer:
    w: Any
    name: str
    inner: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Its __init__ takes one argument, and __post_init__ makes the rest: neither may run again."""

    w: Any
    doubled: Any = dataclasses.field(init=False)
    made: list[int] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self):
        object.__setattr__(self, "doubled", self.w * 2)
        self.made.append(1)


@flax.struct.dataclass
class Struct:
    w: Any
    inner: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(1)(x)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))(x)
        return nn.Dense(1, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, (None, "out")))(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.act = nnx.relu
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.width = 2


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.second = nnx.Linear(2, 2, rngs=rngs)
        self.second.kernel = self.first.kernel


class Child(nnx.Module):
    def __init__(self, parent, rngs):
        self.parent = parent
        self.lin = nnx.Linear(2, 2, rngs=rngs)


class Circle(nnx.Module):
    def __init__(self, rngs):
        self.child = Child(self, rngs)


class Gate(eqx.Module):
    lin: eqx.nn.Linear
    act: Any
    empty: None
    scale: float
    name: str = eqx.field(static=True)
    sizes: list = eqx.field(static=True)


class Language(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self):
        embedding = eqx.nn.Embedding(3, 2, key=KEY)
        linear = eqx.nn.Linear(2, 3, use_bias=False, key=KEY)
        self.shared = eqx.nn.Shared((embedding, linear), lambda pair: pair[1].weight, lambda pair: pair[0].weight)


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.fc2 = torch.nn.Linear(2, 2, bias=False)
        self.fc2.weight = self.fc1.weight
        self.register_buffer("table", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.act = torch.nn.ReLU()


def haiku_params():
    def forward(x):
        return hk.nets.MLP([3, 1])(x)

    return hk.transform(forward).init(jax.random.PRNGKey(0), ones(1, 2))


def state_dict():
    return TorchNet().state_dict()


TREE = params()["params"]
MASK = jax.tree.map(lambda leaf: leaf.ndim == 2, TREE)
GROUPS = {"Dense_0": "frozen", "Dense_1": "train"}


def grouped(tree):
    return {key: jax.tree.map(lambda _, group=GROUPS[key]: group, below) for key, below in tree.items()}


class Case(NamedTuple):
    """A tree, its paths as they print, and a selector with the paths that it finds."""

    make: Any
    paths: list[str]
    selector: str
    selected: list[str]


MOMENTS = [f"{m}/Dense_{i}/{leaf}" for m in ("mu", "nu") for i in (0, 1) for leaf in ("bias", "kernel")]
MASKED = [f"{m}/Dense_{i}/kernel" for m in ("mu", "nu") for i in (0, 1)]
HYPER = [f"hyperparams/{name}" for name in ("learning_rate", "b1", "b2", "eps", "eps_root")]

CASES = {
    "nested dicts": Case(
        params,
        [f"params/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")],
        "**/Dense_[-1]/kernel",
        ["params/Dense_1/kernel"],
    ),
    "dicts out of order": Case(
        lambda: {"z": ones(1), "a": {"y": ones(1), "b": np.ones(1)}, 3: ones(1), "m": {}},
        ["z", "a/y", "a/b", "3"],
        "a/*",
        ["a/y", "a/b"],
    ),
    "lists and tuples": Case(
        lambda: {"layers": [{"w": ones(1)}, {"w": ones(1)}, ({"w": ones(1)}, ones(2))], "none": [None, ()]},
        ["layers/0/w", "layers/1/w", "layers/2/0/w", "layers/2/1"],
        "layers[-1]/**",
        ["layers/2/0/w", "layers/2/1"],
    ),
    "a list": Case(lambda: [ones(1), [ones(2)], "text"], ["0", "1/0"], "[-1]/*", ["1/0"]),
    "named tuples": Case(
        lambda: Pair(ones(1), Pair(ones(2), [ones(3), 1.5])),
        ["left", "right/left", "right/right/0"],
        "**/left",
        ["left", "right/left"],
    ),
    "ordered and default dicts": Case(
        lambda: collections.OrderedDict(z=ones(1), a=collections.defaultdict(list, b=ones(2))),
        ["z", "a/b"],
        "a/b",
        ["a/b"],
    ),
    "dataclass": Case(
        lambda: Layer(ones(2), "first", [Layer(ones(1), "second")]), ["w", "inner/0/w"], "inner[0]/w", ["inner/0/w"]
    ),
    "frozen dataclass": Case(lambda: Frozen(ones(2)), ["w", "doubled"], "w", ["w"]),
    "flax.struct": Case(lambda: Struct(ones(2), Struct(ones(1), {})), ["w", "inner/w"], "inner/w", ["inner/w"]),
    "FrozenDict": Case(
        lambda: flax.core.freeze(params()),
        [f"params/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")],
        "params/Dense_0/*",
        ["params/Dense_0/kernel", "params/Dense_0/bias"],
    ),
    "linen variables": Case(
        lambda: Net().init(KEY, ones(1, 2)),
        [
            *("params/Dense_0/kernel", "params/Dense_0/bias", "params/BatchNorm_0/scale", "params/BatchNorm_0/bias"),
            *("params/Dense_1/kernel", "params/Dense_1/bias"),
            *("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"),
        ],
        "**/BatchNorm_[0]/{mean,scale}",
        ["params/BatchNorm_0/scale", "batch_stats/BatchNorm_0/mean"],
    ),
    "boxed linen params": Case(
        lambda: Boxed().init(KEY, ones(1, 2)),
        [f"params/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")],
        "**/kernel",
        ["params/Dense_0/kernel", "params/Dense_1/kernel"],
    ),
    "nnx module": Case(
        lambda: Block(nnx.Rngs(0)),
        [
            *(f"layers/{i}/{leaf}" for i in range(3) for leaf in ("kernel", "bias")),
            *("norm/mean", "norm/var", "norm/scale", "norm/bias", "drop/rngs/key", "drop/rngs/count"),
        ],
        "layers[-1]/kernel",
        ["layers/2/kernel"],
    ),
    "nnx tied": Case(
        lambda: Tied(nnx.Rngs(0)),
        ["first/kernel", "first/bias", "second/bias"],
        "second/*",
        ["second/kernel", "second/bias"],
    ),
    "nnx circle": Case(
        lambda: Circle(nnx.Rngs(0)), ["child/lin/kernel", "child/lin/bias"], "**/bias", ["child/lin/bias"]
    ),
    "nnx state": Case(
        lambda: nnx.state(Block(nnx.Rngs(0)), nnx.Param),
        [f"layers/{i}/{leaf}" for i in range(3) for leaf in ("bias", "kernel")] + ["norm/bias", "norm/scale"],
        "layers[:2]/bias",
        ["layers/0/bias", "layers/1/bias"],
    ),
    "nnx in a dict": Case(
        lambda: {"model": Tied(nnx.Rngs(0)), "step": ones()},
        ["model/first/kernel", "model/first/bias", "model/second/bias", "step"],
        "model/**/bias",
        ["model/first/bias", "model/second/bias"],
    ),
    "equinox mlp": Case(
        lambda: eqx.nn.MLP(2, 1, 3, 1, key=KEY),
        ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"],
        "layers[-1]/weight",
        ["layers/1/weight"],
    ),
    "equinox with functions and statics": Case(
        lambda: Gate(eqx.nn.Linear(2, 2, key=KEY), jax.nn.relu, None, 0.5, "gate", [2, 2]),
        ["lin/weight", "lin/bias"],
        "lin/bias",
        ["lin/bias"],
    ),
    "equinox shared": Case(Language, ["shared/pytree/0/weight"], "**/weight", ["shared/pytree/0/weight"]),
    "equinox sequential": Case(
        lambda: eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=KEY), eqx.nn.Lambda(jax.nn.relu), eqx.nn.LayerNorm(2)]),
        ["layers/0/weight", "layers/0/bias", "layers/2/weight", "layers/2/bias"],
        "layers/<n>/bias",
        ["layers/0/bias", "layers/2/bias"],
    ),
    "haiku": Case(
        haiku_params,
        ["mlp/~/linear_0/w", "mlp/~/linear_0/b", "mlp/~/linear_1/w", "mlp/~/linear_1/b"],
        "mlp/~/linear_[-1]/w",
        ["mlp/~/linear_1/w"],
    ),
    "optax adam in a chain": Case(
        lambda: optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(TREE),
        ["1/0/count", *(f"1/0/{path}" for path in MOMENTS)],
        "**/mu/Dense_0/**",
        ["1/0/mu/Dense_0/bias", "1/0/mu/Dense_0/kernel"],
    ),
    "optax masked": Case(
        lambda: optax.masked(optax.adam(1e-3), MASK).init(TREE),
        ["inner_state/0/count", *(f"inner_state/0/{path}" for path in MASKED)],
        "**/nu/**",
        ["inner_state/0/nu/Dense_0/kernel", "inner_state/0/nu/Dense_1/kernel"],
    ),
    "optax partition": Case(
        lambda: optax.partition({"train": optax.adam(1e-3), "frozen": optax.set_to_zero()}, grouped).init(TREE),
        [
            "inner_states/train/inner_state/0/count",
            *(f"inner_states/train/inner_state/0/{p}" for p in MOMENTS if "Dense_1" in p),
        ],
        "**/mu/**/kernel",
        ["inner_states/train/inner_state/0/mu/Dense_1/kernel"],
    ),
    "optax inject_hyperparams": Case(
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3).init(TREE),
        ["count", *HYPER, "inner_state/0/count", *(f"inner_state/0/{path}" for path in MOMENTS)],
        "hyperparams/learning_rate",
        ["hyperparams/learning_rate"],
    ),
    "optax MultiSteps": Case(
        lambda: optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).init(TREE),
        [
            *("mini_step", "gradient_step"),
            *(f"inner_opt_state/0/trace/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("bias", "kernel")),
            *(f"acc_grads/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("bias", "kernel")),
        ],
        "acc_grads/**/bias",
        ["acc_grads/Dense_0/bias", "acc_grads/Dense_1/bias"],
    ),
    "TrainState": Case(
        lambda: TrainState.create(apply_fn=Net().apply, params=params()["params"], tx=optax.adam(1e-3)),
        [
            *(f"params/Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")),
            *("opt_state/0/count", *(f"opt_state/0/{path}" for path in MOMENTS)),
        ],
        "params/Dense_[0]/*",
        ["params/Dense_0/kernel", "params/Dense_0/bias"],
    ),
    "torch module": Case(
        TorchNet,
        [
            *("table", "fc1.weight", "fc1.bias"),
            *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        ],
        "fc2.weight",
        ["fc2.weight"],
    ),
    "torch sequential": Case(
        lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)),
        ["0.weight", "0.bias", "2.weight", "2.bias"],
        "[-1].weight",
        ["2.weight"],
    ),
    "torch parametrized": Case(
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)),
        ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"],
        "**.original<n>",
        ["parametrizations.weight.original0", "parametrizations.weight.original1"],
    ),
    "torch state dict": Case(
        state_dict,
        [
            *("table", "fc1.weight", "fc1.bias"),
            *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        ],
        "fc2/weight",
        ["fc2.weight"],
    ),
    "flat dict of numpy": Case(
        lambda: {f"model.layers.{i}.mlp.w": np.ones(2) for i in (0, 1, 2, 10)},
        [f"model/layers/{i}/mlp/w".replace("/", ".") for i in (0, 1, 2, 10)],
        "model.layers[-1].**",
        ["model.layers.10.mlp.w"],
    ),
    "numpy and scalars": Case(
        lambda: {
            "a": np.ones((2, 2), order="F"),
            "scalar": np.float32(3),
            "zero-d": np.array(1.0),
            "empty": np.ones((0, 3)),
        },
        ["a", "scalar", "zero-d", "empty"],
        "{scalar,a}",
        ["a", "scalar"],
    ),
    "an array": Case(lambda: ones(2, 3), ['""'], "**", ['""']),
}
parametrize = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# ---- what a tree is made of, found without Paramend


def skeleton(node, leaf=None, above=()):
    """The types of all containers with their keys in order, and at the leaves what `leaf` says.

    By default that is the type of an array, and of anything else the very object.
    """
    leaf = leaf or (lambda node: type(node) if isinstance(node, ARRAYS) else (type(node), id(node)))
    if id(node) in above:
        return "circle"

    def inner(child):
        return skeleton(child, leaf, (*above, id(node)))

    if isinstance(node, torch.nn.Module):
        return [(name, type(module)) for name, module in node.named_modules()]
    if isinstance(node, nnx.Variable):
        return type(node), node.get_metadata(), inner(node.get_raw_value())
    if isinstance(node, nnx.Pytree):  # NNX itself sorts the attributes of a copy
        held = {name: value for name, value in vars(node).items() if not name.startswith("_pytree__")}
        return type(node), {name: inner(value) for name, value in held.items()}
    if isinstance(node, collections.abc.Mapping):
        return type(node), [(key, inner(child)) for key, child in node.items()]
    if isinstance(node, list | tuple):
        return type(node), [inner(child) for child in node]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return type(node), [(field.name, inner(getattr(node, field.name))) for field in dataclasses.fields(node)]
    return leaf(node)


def containers(tree):
    """The skeleton without what stands at the leaves."""
    return skeleton(tree, leaf=lambda node: None)


ARRAYS = np.ndarray | np.generic | jax.Array | torch.Tensor


def arrays(tree):
    """The arrays of a tree as its framework lists them."""
    if isinstance(tree, torch.nn.Module):
        return list(tree.state_dict(keep_vars=True).values())
    if isinstance(tree, nnx.Module):
        return jax.tree.leaves(nnx.state(tree))
    if isinstance(tree, dict) and any(isinstance(child, nnx.Module) for child in tree.values()):
        return [array for child in tree.values() for array in arrays(child)]
    if isinstance(tree, Layer | Frozen):
        return [array for field in dataclasses.fields(tree) for array in arrays(getattr(tree, field.name))]
    if isinstance(tree, list) and any(isinstance(child, Layer) for child in tree):
        return [array for child in tree for array in arrays(child)]
    if isinstance(tree, dict) and any(isinstance(key, int) for key in tree):  # JAX cannot sort these
        return [array for child in tree.values() for array in arrays(child)]
    found = list(tree.values()) if isinstance(tree, collections.OrderedDict) else jax.tree.leaves(tree)
    return [leaf for leaf in found if isinstance(leaf, ARRAYS | dict)]


def flat(tree):
    return [leaf for found in arrays(tree) for leaf in (arrays(found) if isinstance(found, dict) else [found])]


def storage(leaf):
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else id(leaf)


def scalars(leaf):
    return leaf.numel() if isinstance(leaf, torch.Tensor) else leaf.size


def values(leaf):
    leaf = leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


# ---- for every container


@parametrize
def test_paths_as_they_print(case):
    assert pm.at(case.make(), "**").paths == case.paths


@parametrize
def test_each_path_selects_its_leaf(case):
    tree = case.make()
    for path, leaf in pm.at(tree, "**"):
        assert pm.at(tree, path).one() is leaf


@parametrize
def test_a_selector_finds_the_same_leaves_with_either_separator(case):
    tree = case.make()
    assert pm.at(tree, case.selector).paths == case.selected
    swapped = case.selector.translate(str.maketrans("/.", "./"))
    assert pm.at(tree, swapped).paths == case.selected


@parametrize
def test_an_edit_changes_the_selected_leaves_and_keeps_all_else(case):
    tree = case.make()
    selection = pm.at(tree, case.selector)
    chosen = {storage(leaf) for leaf in selection.get().values()}
    before, shape = flat(tree), skeleton(tree)
    saved = [values(leaf).copy() for leaf in before]

    edited = selection.zero()

    after = flat(edited)
    assert type(edited) is type(tree)
    assert skeleton(edited) == shape == skeleton(tree)
    assert len(before) == len(after)
    for old, new, kept in zip(before, after, saved, strict=True):
        assert values(old).tobytes() == kept.tobytes()  # the tree given is as it was
        if storage(old) in chosen:
            assert new is not old
            assert (values(new) == 0).all()
            assert (type(new), new.shape, new.dtype) == (type(old), old.shape, old.dtype)
        elif isinstance(tree, collections.OrderedDict) or not isinstance(old, torch.Tensor):
            assert new is old
        else:
            assert storage(new) == storage(old)
    assert sorted(pm.at(edited, case.selector).paths) == sorted(case.selected)  # NNX sorts the attributes of a copy


@parametrize
def test_param_count_is_that_of_the_framework(case):
    tree = case.make()
    once = {storage(leaf): scalars(leaf) for leaf in flat(tree)}
    empty = sum(1 for leaf in flat(tree) if scalars(leaf) == 0)
    assert pm.param_count(tree) == sum(once.values())
    assert len(once) + max(empty - 1, 0) >= len(case.paths)
    assert pm.param_count(tree, case.selector) == sum(
        scalars(leaf) for leaf in pm.at(tree, case.selector).get().values()
    )


@parametrize
def test_a_mask_has_the_same_containers_and_selects_what_it_was_made_of(case):
    tree = case.make()
    mask = pm.at(tree, case.selector).mask()
    assert found(tree, mask) == found(tree, case.selector)
    if isinstance(tree, torch.nn.Module):
        every_path = set(tree.state_dict())
        assert set(mask) == every_path
    else:
        assert containers(mask) == containers(without_variables(tree))


def without_variables(tree):
    """The State of an NNX module, without its Variables; other trees as they are."""
    if isinstance(tree, dict) and any(isinstance(child, nnx.Module) for child in tree.values()):
        return {key: without_variables(child) for key, child in tree.items()}
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    if not isinstance(tree, nnx.State):
        return tree
    return jax.tree.map(lambda _: 0, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


@parametrize
def test_labels_have_the_same_containers(case):
    tree = case.make()
    named = pm.labels(tree, {"chosen": case.selector, "rest": "**"})
    if isinstance(tree, torch.nn.Module):
        mask = pm.at(tree, case.selector).mask()
        assert named == {path: "chosen" if chosen else "rest" for path, chosen in mask.items()}
    else:
        assert containers(named.tree if callable(tree) else named) == containers(without_variables(tree))


def found(tree, selector):
    return {storage(leaf) for _, leaf in pm.at(tree, selector)}


@parametrize
def test_every_verb_keeps_the_containers(case):
    tree = case.make()
    floats = pm.sel(case.selector).where(dtype="float")
    before = skeleton(tree)
    edits = {
        "fill": lambda at: at.fill(0.5),
        "add": lambda at: at.add(1),
        "multiply": lambda at: at.multiply(2),
        "apply": lambda at: at.apply(lambda x: x),
        "noise": lambda at: at.noise(0.1, seed=1),
        "set": lambda at: at.set({path: values(leaf) for path, leaf in at}),
    }
    for name, edit in edits.items():
        assert skeleton(edit(pm.at(tree, floats))) == before, name


# ---- what is never selected


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"w": ones(1), "f": jax.nn.relu, "none": None, "lr": 0.1, "n": 3, "on": True, "name": "x", "b": b"x"},
        lambda: {"w": ones(1), "type": int, "module": jax, "partial": optax.sgd(0.1).update, "dtype": np.dtype("int8")},
        lambda: Gate(eqx.nn.Linear(2, 2, use_bias=False, key=KEY), jax.nn.relu, None, 0.5, "gate", [2, 2]),
        lambda: [ones(1), object(), range(3), {1, 2}, slice(1)],
    ],
)
def test_only_arrays_are_selected(make):
    tree = make()
    selection = pm.at(tree, "**")
    assert len(selection) == 1
    edited = selection.zero()
    assert skeleton(edited) == skeleton(tree)
    with pytest.raises(NoMatch):
        pm.at(tree, "{f,none,lr,n,on,name,b,act,scale,type,1}")


def test_strings_and_objects_of_numpy_are_refused_by_edits():
    tree = {"names": np.array(["a", "b"]), "objects": np.array([None, 1]), "w": np.ones(1)}
    assert pm.at(tree, "w").zero()["names"] is tree["names"]
    for path in ("names", "objects"):
        with pytest.raises(Unsupported, match=path):
            pm.at(tree, path).multiply(2)


# ---- abstract trees


def test_abstract_trees_are_selected_masked_and_counted():
    abstract = jax.eval_shape(lambda: params())
    assert pm.at(abstract, "**/Dense_[-1]/kernel").paths == ["params/Dense_1/kernel"]
    assert pm.at(abstract, "**/kernel").mask() == pm.at(params(), "**/kernel").mask()
    assert pm.param_count(abstract) == pm.param_count(params()) == 13
    assert pm.at(abstract, pm.sel("**").where(shape=(3, 1))).paths == ["params/Dense_1/kernel"]
    with pytest.raises(Unsupported, match="abstract"):
        pm.at(abstract, "**/kernel").zero()
    module = nnx.eval_shape(lambda: Tied(nnx.Rngs(0)))
    assert sorted(pm.at(module, "**/bias").paths) == ["first/bias", "second/bias"]
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 3)
    assert pm.param_count(empty) == 9
    with pytest.raises(Unsupported, match="meta"):
        pm.at(empty, "weight").fill(1.0)


# ---- odd shapes of trees


def test_empty_containers_are_kept():
    tree = {"a": {}, "w": ones(1), "b": [[], ()], "c": None, "d": optax.EmptyState(), "e": collections.OrderedDict()}
    edited = pm.at(tree, "w").zero()
    assert skeleton(edited) == skeleton(tree)
    assert pm.at(tree, "w").mask() == {**tree, "w": True}


@pytest.mark.parametrize(
    "tree", [{}, [], (), None, {"a": [{}]}, optax.EmptyState(), {"a": "text"}, 3, torch.nn.ReLU()], ids=repr
)
def test_a_tree_without_arrays_counts_nothing(tree):
    assert pm.param_count(tree) == 0
    with pytest.raises(NoMatch, match="no arrays"):
        pm.at(tree, "**")


@pytest.mark.parametrize(
    "leaf", [np.ones(2), jnp.ones(2), torch.ones(2), np.float32(1)], ids=lambda leaf: type(leaf).__name__
)
def test_a_bare_array_is_a_tree(leaf):
    selection = pm.at(leaf, "**")
    assert selection.one() is leaf
    assert type(selection.zero()) is type(leaf)
    assert float(values(selection.fill(3)).sum()) == 3 * leaf.size if not isinstance(leaf, torch.Tensor) else 6
    assert selection.mask() is True
    assert pm.at(leaf, '""').paths == ['""']


@pytest.mark.parametrize(
    "wrap", [lambda x: {"k": x}, lambda x: [x], lambda x: Pair(x, None)], ids=["dict", "list", "tuple"]
)
def test_deep_nesting(wrap):
    tree = leaf = np.ones(1)
    for _ in range(200):
        tree = wrap(tree)
    (path,) = pm.at(tree, "**").paths
    assert path.count("/") == 199
    edited = pm.at(tree, path).zero()
    assert (pm.at(edited, "**").one() == 0).all()
    assert pm.at(tree, "**").one() is leaf
    assert pm.at(tree, pm.at(tree, "**").mask()).one() is leaf


def test_many_leaves():
    tree = {
        f"block_{i}": {f"Dense_{j}": {"kernel": np.ones(2), "bias": np.ones(1)} for j in range(10)} for i in range(1000)
    }
    assert pm.param_count(tree) == 30_000
    assert len(pm.at(tree, "**/kernel", count=10_000).zero()) == 1000
    assert pm.at(tree, "block_[-1]/Dense_[-1]/*").paths == ["block_999/Dense_9/kernel", "block_999/Dense_9/bias"]
    edited = pm.at(tree, "block_500/Dense_3/bias").zero()
    changed = [path for path, leaf in pm.at(edited, "**") if leaf[0] == 0]
    assert changed == ["block_500/Dense_3/bias"]


def test_a_key_of_any_kind():
    tree = {0: ones(1), "0": ones(1), (1, 2): ones(1), None: ones(1), 1.5: ones(1), True: ones(1), b"b": ones(1)}
    edited = pm.at(tree, "0").zero()
    assert list(edited) == list(tree)
    assert [key for key in tree if edited[key] is not tree[key]] == [0, "0"]
    for key in tree:
        (path,) = pm.at({key: tree[key]}, "**").paths
        assert pm.at(tree, path).zero()[key] is not tree[key]


def test_keys_keep_their_order_under_every_edit():
    tree = {"z": {"b": ones(1), "a": ones(1)}, "a": ones(1), "m": collections.OrderedDict(y=ones(1), x=ones(1))}
    for edited in (pm.at(tree, "**").zero(), pm.at(tree, "a").mask(), pm.labels(tree, {"x": "**"})):
        assert [list(edited), list(edited["z"]), list(edited["m"])] == [["z", "a", "m"], ["b", "a"], ["y", "x"]]


def test_attributes_of_a_state_dict_stay():
    state = state_dict()
    edited = pm.at(state, "fc1.weight").zero()
    assert type(edited) is collections.OrderedDict
    assert edited._metadata == state._metadata
    TorchNet().load_state_dict(edited)


def test_a_default_dict_keeps_its_factory():
    tree = collections.defaultdict(list, w=ones(1))
    edited = pm.at(tree, "w").zero()
    assert edited.default_factory is list


def test_init_and_post_init_do_not_run_again():
    tree = Frozen(np.ones(2))
    edited = pm.at(tree, "w").zero()
    assert edited.made == [1]
    assert edited.doubled is tree.doubled
    assert (edited.w == 0).all()


def test_boxes_keep_their_names():
    variables = Boxed().init(KEY, ones(1, 2))
    edited = pm.at(variables, "**/kernel").zero()
    for old, new in [(variables, edited)]:
        for layer in ("Dense_0", "Dense_1"):
            box, was = new["params"][layer]["kernel"], old["params"][layer]["kernel"]
            assert type(box) is type(was)
            assert box.names == was.names
            assert (box.value == 0).all()
    assert nn.get_partition_spec(edited) == nn.get_partition_spec(variables)
    with pytest.raises(NoMatch):
        pm.at(variables, "**/kernel/value")


# ---- tied leaves


def test_a_tied_nnx_variable_is_edited_once_and_stays_tied():
    model = Tied(nnx.Rngs(0))
    edited = pm.at(model, "**/kernel", count=1).add(1)
    assert edited.first.kernel is edited.second.kernel
    assert edited is not model
    assert model.first.kernel is model.second.kernel
    np.testing.assert_array_equal(edited.first.kernel[...], model.first.kernel[...] + 1)
    pm.at(model, "second/kernel").zero_()
    assert (model.first.kernel[...] == 0).all()


def test_a_tied_torch_parameter_is_edited_once_and_stays_tied():
    net = TorchNet()
    edited = pm.at(net, "**.{fc1,fc2}.weight", count=1).add(1)
    assert edited.fc1.weight is edited.fc2.weight
    assert edited.fc1.weight is not net.fc1.weight
    assert torch.equal(edited.fc1.weight, net.fc1.weight + 1)
    pm.at(net, "fc2.weight").zero_()
    assert (net.fc1.weight == 0).all()


def test_tied_tensors_of_a_state_dict_stay_tied():
    state = state_dict()
    assert pm.at(state, "fc*.weight").paths == ["fc1.weight"]
    edited = pm.at(state, "fc2.weight").fill(2.0)
    assert storage(edited["fc1.weight"]) == storage(edited["fc2.weight"])
    assert (edited["fc1.weight"] == 2).all()
    assert (state["fc1.weight"] != 2).all()


def test_views_of_one_storage_are_not_tied():
    whole = torch.ones(4)
    state = {"first": whole[:2], "second": whole[2:], "all": whole}
    assert len(pm.at(state, "**")) == 3
    edited = pm.at(state, "first").zero()
    assert edited["second"] is state["second"]
    assert (edited["second"] == 1).all()


@pytest.mark.parametrize("shared", [np.ones(2), jnp.ones(2)], ids=["numpy", "jax"])
def test_one_array_at_two_places_is_two_leaves(shared):
    tree = {"params": shared, "ema": shared, "other": np.ones(2)}
    edited = pm.at(tree, "ema").zero()
    assert edited["params"] is shared and shared.tolist() == [1, 1]
    assert edited["ema"].tolist() == [0, 0]
    assert pm.param_count(tree) == 6
    assert pm.at(tree, "ema").mask() == {"params": False, "ema": True, "other": False}
    assert pm.labels(tree, {"a": "ema", "b": "**"}) == {"params": "b", "ema": "a", "other": "b"}
    assert pm.at(tree, ~pm.sel("ema")).paths == ["params", "other"]


# ---- inside jax's transformations

TRANSFORMED = ["nested dicts", "FrozenDict", "named tuples", "flax.struct", "linen variables", "boxed linen params"]
TRANSFORMED += ["haiku", "optax adam in a chain", "optax masked", "TrainState", "nnx state", "lists and tuples"]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_edits_inside_jit_are_those_outside(name):
    case = CASES[name]
    held, rest = eqx.partition(case.make(), eqx.is_array)

    def edit(held):
        return eqx.filter(pm.at(eqx.combine(held, rest), case.selector).add(1), eqx.is_array)

    eager, compiled = edit(held), jax.jit(edit)(held)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    jax.tree.map(np.testing.assert_array_equal, eager, compiled)


def test_an_edit_under_grad_cuts_the_gradient_of_what_it_replaced():
    def loss(tree):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pm.at(tree, "**/kernel").zero()))

    gradient = jax.grad(loss)(params())["params"]["Dense_0"]
    assert (gradient["kernel"] == 0).all()
    assert (gradient["bias"] == 2).all()


def test_an_edit_under_vmap_is_of_each_example():
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params())
    edited = jax.vmap(lambda tree: pm.at(tree, "**/bias").multiply(3))(batch)["params"]["Dense_0"]
    np.testing.assert_array_equal(edited["bias"], jnp.stack([3 * ones(3), 6 * ones(3)]))
    np.testing.assert_array_equal(edited["kernel"], batch["params"]["Dense_0"]["kernel"])


def test_edits_of_modules_inside_their_own_transformations():
    @nnx.jit
    def forward(model, x):
        return pm.at(model, "second/kernel").zero().first(x)

    model = Tied(nnx.Rngs(0))
    np.testing.assert_array_equal(forward(model, ones(1, 2)), jnp.zeros((1, 2)) + model.first.bias[...])

    @eqx.filter_jit
    def run(mlp, x):
        return pm.at(mlp, "layers[-1]/weight").zero()(x)

    mlp = eqx.nn.MLP(2, 1, 3, 1, key=KEY)
    np.testing.assert_array_equal(run(mlp, ones(2)), mlp.layers[-1].bias)


# ---- masks at work


def test_masks_and_labels_fit_optax_and_equinox():
    tree = params()
    tx = optax.masked(optax.set_to_zero(), pm.at(tree, "**/Dense_0/**").mask())
    updates, _ = tx.update(tree, tx.init(tree))
    assert (updates["params"]["Dense_0"]["kernel"] == 0).all()
    assert (updates["params"]["Dense_1"]["kernel"] == 1).all()

    groups = {"train": optax.sgd(1.0), "frozen": optax.set_to_zero()}
    tx = optax.partition(groups, pm.labels(tree, {"frozen": "**/Dense_0/**", "train": "**"}))
    updates, _ = tx.update(tree, tx.init(tree))
    assert (updates["params"]["Dense_0"]["bias"] == 0).all()
    assert (updates["params"]["Dense_1"]["bias"] == -1).all()

    mlp = eqx.nn.MLP(2, 1, 3, 1, key=KEY)
    trained, frozen = eqx.partition(mlp, pm.at(mlp, "layers[-1]/**").mask())
    assert trained.layers[0].weight is None
    assert trained.layers[1].weight is mlp.layers[1].weight
    assert frozen.layers[1].bias is None


def test_labels_take_the_first_group_and_leave_nothing_out():
    tree = params()
    named = pm.labels(tree, {"last": "**/Dense_[-1]/**", "bias": "**/bias", "rest": "**"})["params"]
    assert named == {"Dense_0": {"kernel": "rest", "bias": "bias"}, "Dense_1": {"kernel": "last", "bias": "last"}}
    with pytest.raises(NoMatch, match="no group"):
        pm.labels(tree, {"bias": "**/bias"})


# ---- classes


def test_leaves_held_by_a_class():
    assert pm.at(Block(nnx.Rngs(0)), nnx.BatchNorm).paths == [
        f"norm/{name}" for name in ("mean", "var", "scale", "bias")
    ]
    assert len(pm.at(Block(nnx.Rngs(0)), nnx.Linear)) == 6
    assert pm.at(TorchNet(), torch.nn.Linear).paths == ["fc1.weight", "fc1.bias"]
    assert pm.at(eqx.nn.MLP(2, 1, 3, 1, key=KEY), eqx.nn.Linear).paths == CASES["equinox mlp"].paths
    state = optax.adam(1e-3).init(TREE)
    assert len(pm.at(state, optax.ScaleByAdamState)) == 9
    with pytest.raises(NoMatch, match="Conv") as caught:
        pm.at(Block(nnx.Rngs(0)), nnx.Conv)
    assert "Linear" in str(caught.value)


# ---- in place


def test_in_place_on_a_torch_module():
    net = TorchNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.fc1.bias.requires_grad_(False)
    ids = [id(leaf) for leaf in flat(net)]
    pointers = [leaf.data_ptr() for leaf in flat(net)]
    asked = [leaf.requires_grad for leaf in flat(net)]

    assert pm.at(net, "fc2.weight").zero_() is None
    pm.at(net, "norm.{running_mean,weight}").fill_(0.5)
    pm.at(net, "fc1.bias")[0].fill_(7.0)

    assert [id(leaf) for leaf in flat(net)] == ids
    assert [leaf.data_ptr() for leaf in flat(net)] == pointers
    assert [leaf.requires_grad for leaf in flat(net)] == asked
    assert (net.fc1.weight == 0).all()
    assert (net.norm.running_mean == 0.5).all()
    assert net.fc1.bias[0] == 7 != net.fc1.bias[1]
    net.fc1(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (net.fc1.weight != 0).all()
    assert net.fc1.weight is net.fc2.weight


def test_in_place_on_a_state_dict_reaches_the_module():
    net = TorchNet()
    state = net.state_dict()
    pm.at(state, "fc1.weight").zero_()
    assert (net.fc1.weight == 0).all()
    assert net.fc1.weight.requires_grad


def test_in_place_on_an_nnx_module():
    model = Block(nnx.Rngs(0))
    variable, other = model.layers[0].kernel, model.layers[1].kernel[...]
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    pm.at(model, "layers/0/kernel").fill_(2.0)
    pm.at(model, "layers[-1]/kernel")[0].zero_()
    assert model.layers[0].kernel is variable
    assert (variable[...] == 2).all()
    assert model.layers[1].kernel[...] is other
    assert (model.layers[2].kernel[0] == 0).all()
    assert (model.layers[2].kernel[1] != 0).all()
    optimizer.update(model, nnx.grad(lambda m: m.layers[0](ones(1, 2)).sum())(model))
    assert (variable[...] != 2).any()


def test_in_place_on_numpy():
    tree = {"w": np.ones((2, 2)), "b": np.ones(2)}
    w = tree["w"]
    pm.at(tree, "w")[0].zero_()
    assert tree["w"] is w
    assert w.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    "name", ["nested dicts", "FrozenDict", "TrainState", "optax adam in a chain", "equinox mlp", "haiku"]
)
def test_in_place_on_jax_arrays_is_refused(name):
    case = CASES[name]
    tree = case.make()
    saved = [values(leaf).copy() for leaf in flat(tree)]
    with pytest.raises(Unsupported, match="in place") as caught:
        pm.at(tree, case.selector).zero_()
    assert "zero()" in caught.value.hint
    for leaf, before in zip(flat(tree), saved, strict=True):
        np.testing.assert_array_equal(values(leaf), before)


def test_in_place_changes_all_or_nothing():
    read_only = np.ones(2)
    read_only.flags.writeable = False
    tree = {"a": np.ones(2), "b": read_only, "c": ones(2)}
    for selector in ("{a,b}", "{a,c}", "**"):
        with pytest.raises(Unsupported):
            pm.at(tree, selector).zero_()
        assert (tree["a"] == 1).all()


def test_modules_lose_and_gain_no_entries():
    for tree in (TorchNet(), Tied(nnx.Rngs(0))):
        with pytest.raises(Unsupported, match="fixed"):
            pm.at(tree, "**").delete()
    with pytest.raises(Unsupported, match="fixed"):
        pm.at(Frozen(np.ones(1)), "w").delete()
    assert list(pm.at(state_dict(), "fc{1,2}.weight").delete())[:2] == ["table", "fc1.bias"]


def test_a_mask_of_another_tree_is_refused():
    with pytest.raises(BadArgument, match="params/Dense_1"):
        pm.at(params(), {"params": {"Dense_0": True}})
