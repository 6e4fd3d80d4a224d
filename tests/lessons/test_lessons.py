"""The lessons: references against numbers, the grader against every mistake, files, the command line."""

import inspect
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import paramend.lessons as lessons
from paramend.cli.main import cli
from paramend.errors import BadArgument, MissingExtra
from paramend.lessons.grading import draw, grade
from paramend.lessons.lesson import ROWS, Case, Lesson, find
from paramend.lessons.observation import differences, sketch
from paramend.lessons.solutions import load
from support.numerics import assert_close

pytestmark = pytest.mark.slow  # many small programs to compile

small = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
counts = st.integers(1, 4)
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- the references


@pytest.mark.numeric
@small
@given(seeds, counts, counts, counts, st.floats(-2, 2, width=16))
def test_kernel_replace_gives_value_times_sum_plus_bias(seed, n, width, features, value):
    x = normal(seed, n, width)
    y = lessons.kernel_replace(float(seed), x, float(features), value)
    assert y.shape == (n, features)
    # the bias of a fresh Dense is zero
    wanted = np.repeat(value * x.sum(1, keepdims=True), features, 1)
    assert_close(y, wanted, terms=width + 1, scale=2 * np.abs(x).sum(1).max())


@pytest.mark.parametrize("form", [list, np.asarray, jnp.asarray])
def test_inputs_may_be_lists_numpy_or_jax_arrays(form):
    x = form([[1.0, 2.0], [3.0, 4.0]])
    assert lessons.kernel_replace(7.0, x, 3.0, 2.0).tolist() == [[6.0] * 3, [14.0] * 3]
    assert lessons.zero_last_layer(7.0, x, 2.0, 3.0).tolist() == [[1.0] * 3] * 2
    assert lessons.partial_init(7.0, x, 1.0, 1.0, 3.0).tolist() == [2 * 3 + 3 + 3 * 3 + 3, 2]
    assert lessons.freeze_first_dense(7.0, x, form([1.0, 2.0]), 0.1).shape == (3,)


@small
@given(seeds, counts, counts, counts, counts)
def test_zero_last_layer_gives_ones(seed, n, width, layers, features):
    y = lessons.zero_last_layer(float(seed), normal(seed, n, width), float(layers), float(features))
    np.testing.assert_array_equal(y, np.ones((n, features), np.float32))


@pytest.mark.numeric
@small
@given(seeds, st.integers(1, 6), counts, st.floats(0.0078125, 1, width=16))
def test_freeze_first_dense_against_a_forward_pass_by_hand(seed, n, width, lr):
    x, y = normal(seed, n, width), normal(seed + 1, n)
    loss, after, before = lessons.freeze_first_dense(float(seed), x, y, lr)

    class Twin(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(8)(x))
            return linen.Dense(1)(x)

    params = Twin().init(jax.random.PRNGKey(seed), x)["params"]
    hidden = np.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    out = (hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])[:, 0]
    # sums of up to 4 inputs, 8 hidden units and 6 rows, of outputs that come of terms of up to 4
    assert_close(loss, np.mean((out - y) ** 2), terms=4 + 8 + 6, scale=max(16.0, float(loss)), dtype="float32")
    assert_close(before, np.linalg.norm(params["Dense_0"]["kernel"]), terms=4 * 8, dtype="float32")
    assert after == before


@small
@given(seeds, counts, counts, counts, counts)
def test_partial_init_counts_the_bigger_model(seed, width, full, extra, features):
    out = lessons.partial_init(float(seed), normal(seed, 2, width), float(full), float(extra), float(features))
    count = (width + 1) * features + (full + extra - 1) * (features + 1) * features
    assert out.tolist() == [count, full + extra]


def test_partial_init_without_extra_layers():
    assert lessons.partial_init(0.0, normal(0, 2, 3), 2.0, 0.0, 4.0).tolist() == [36, 2]


def test_init_zero_layer_by_layer():
    net = nn.Sequential(nn.Linear(3, 4).bfloat16(), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.Conv1d(1, 2, 3))
    net[3].weight.requires_grad_(False)
    before = dict(net.named_parameters())
    for layer in net:
        lessons.init_zero(layer)
    after = dict(net.named_parameters())
    assert all(after[name] is parameter and not parameter.any() for name, parameter in before.items())
    assert after["0.weight"].dtype == torch.bfloat16
    assert not after["3.weight"].requires_grad and after["3.bias"].requires_grad


# -- the grader

NAMES = [row.name for row in ROWS]


def fingerprint(case: Case) -> tuple:
    """What tells a case from another."""
    args = (
        (repr(arg), *(tensor.tolist() for tensor in arg.state_dict().values()))
        if isinstance(arg, nn.Module)
        else np.asarray(arg).tolist()
        for arg in case.args
    )
    return case.note, case.half, repr(list(args))


def remembering(lesson: Lesson) -> Lesson:
    """The lesson, each solution of which is called on each case only once: observing is deterministic."""
    seen = {}

    def observe(solve, case: Case):
        key = solve, fingerprint(case)
        if key not in seen:
            seen[key] = lesson.observe(solve, case)
        return seen[key]

    return replace(lesson, observe=observe)


TAUGHT = {name: remembering(find(name)) for name in NAMES}
FORMS = [(name, mistake, form) for name in NAMES for mistake in TAUGHT[name].mistakes for form in mistake.forms]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_passes(name):
    verdict = grade(TAUGHT[name], TAUGHT[name].reference, trials=3, seed=1)
    assert verdict.passed and not verdict.failures and not verdict.likeness
    assert f"{name}: passed on" in str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mistake", "form"), FORMS, ids=[f"{n}-{m.name}" for n, m, _ in FORMS])
def test_every_mistake_fails_and_is_named(name, mistake, form):
    verdict = grade(TAUGHT[name], form, trials=2, seed=1)
    assert not verdict.passed
    names = [like.mistake.name for like in verdict.likeness]
    assert mistake.name in names and all(like.everywhere for like in verdict.likeness)
    # What two mistakes share in full is named twice; nothing else is.
    shared = ["`dense_0` for `Dense_0`", "the outer `params` level lost"]
    assert names == [mistake.name] or (name, names) == ("freeze_first_dense", shared), names
    json.dumps(verdict.to_dict())
    assert mistake.why in " ".join(str(verdict).split())


@pytest.mark.parametrize("name", NAMES)
def test_grading_is_deterministic_by_seed(name):
    lesson = TAUGHT[name]
    wrong = lesson.mistakes[0].forms[0]
    assert grade(lesson, wrong, trials=1, seed=1).to_dict() == grade(lesson, wrong, trials=1, seed=1).to_dict()
    one, other = draw(lesson, trials=1, seed=1), draw(lesson, trials=1, seed=2)
    again = draw(lesson, trials=1, seed=1)
    assert [*map(fingerprint, one)] == [*map(fingerprint, again)] != [*map(fingerprint, other)]


def test_rows_and_lessons_agree():
    for row in ROWS:
        lesson = find(row.name)
        assert (lesson.name, lesson.title) == (row.name, row.title)
        assert len({mistake.name for mistake in lesson.mistakes}) == len(lesson.mistakes)
        assert lesson.parameters == tuple(inspect.signature(getattr(lessons, row.name)).parameters)


RIGHT = {
    "kernel_replace": [
        """
        from flax import linen as nn
        import jax, jax.numpy as jnp

        def solve(seed, x, features, value):
            layer = nn.Dense(int(features))
            params = jax.jit(layer.init)(jax.random.key(int(seed)), x)
            kernel = jnp.full_like(params["params"]["kernel"], value)
            return jax.jit(layer.apply)({"params": dict(params["params"], kernel=kernel)}, x)
        """,
        """
        import copy
        import flax.linen as nn, jax

        class Net(nn.Module):
            features: int

            def setup(self):
                self.out = nn.Dense(self.features)

            def __call__(self, x):
                return self.out(x)

        def solve(seed, x, features, value):
            net = nn.Dense(int(features))
            y, params = net.init_with_output(jax.random.PRNGKey(int(seed)), x)
            params = copy.deepcopy(params)
            params["params"]["kernel"] = params["params"]["kernel"] * 0 + value
            return net.apply(params, x)
        """,
    ],
    "zero_last_layer": [
        """
        import flax.linen as nn, jax
        from flax import traverse_util

        def solve(seed, x, num_layers, features):
            n, f = int(num_layers), int(features)
            layers = [nn.Dense(f) for _ in range(n - 1)] + [nn.Dense(f, bias_init=nn.initializers.ones)]
            net = nn.Sequential(layers)
            flat = traverse_util.flatten_dict(net.init(jax.random.PRNGKey(int(seed)), x))
            path = ("params", f"layers_{n - 1}", "kernel")
            flat[path] = flat[path] * 0
            return net.apply(traverse_util.unflatten_dict(flat), x)
        """,
    ],
    "freeze_first_dense": [
        """
        import flax.linen as nn, jax, jax.numpy as jnp, optax
        from flax.training.train_state import TrainState

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(8)(x))
                return nn.Dense(1)(x)

        def solve(seed, x, y, lr):
            net = Net()
            params = net.init(jax.random.PRNGKey(int(seed)), x)["params"]
            state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(lr))
            loss_fn = lambda p: jnp.mean((net.apply({"params": p}, x).squeeze(-1) - y) ** 2)
            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            zero = lambda path, g: jnp.zeros_like(g) if path[0].key == "Dense_0" else g
            state = state.apply_gradients(grads=jax.tree_util.tree_map_with_path(zero, grads))
            norm = lambda p: jnp.sqrt(jnp.sum(p["Dense_0"]["kernel"] ** 2))
            return jnp.array([loss, norm(state.params), norm(params)])
        """,
        """
        import flax.linen as nn, jax, jax.numpy as jnp

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(8)(x))
                return nn.Dense(1)(x)

        def solve(seed, x, y, lr):
            net = Net()
            params = net.init(jax.random.PRNGKey(int(seed)), x)

            @jax.jit
            def step(params):
                loss_fn = lambda p: jnp.mean((net.apply(p, x)[:, 0] - y) ** 2)
                loss, grads = jax.value_and_grad(loss_fn)(params)
                grads["params"]["Dense_0"] = jax.tree.map(jnp.zeros_like, grads["params"]["Dense_0"])
                return loss, jax.tree.map(lambda p, g: p - lr * g, params, grads)

            loss, new = step(params)
            norms = [float(jnp.linalg.norm(p["params"]["Dense_0"]["kernel"])) for p in (new, params)]
            return [float(loss), *norms]
        """,
    ],
    "partial_init": [
        """
        import flax.linen as nn, jax, jax.numpy as jnp

        class Net(nn.Module):
            depth: int
            width: int

            @nn.compact
            def __call__(self, x):
                for _ in range(self.depth):
                    x = nn.tanh(nn.Dense(self.width)(x))
                return x

        def solve(seed, x, num_full_layers, num_extra_layers, features):
            n, extra, width = int(num_full_layers), int(num_extra_layers), int(features)
            k1, k2 = jax.random.split(jax.random.PRNGKey(int(seed)))
            little = Net(n, width).init(k1, x)
            big = Net(n + extra, width).init(k2, x)
            return jnp.array([
                sum(p.size for p in jax.tree.leaves({"params": big["params"] | little["params"]})), n + extra
            ])
        """,
        """
        import flax.linen as nn, jax, numpy as np
        from flax.traverse_util import flatten_dict

        def net(depth, width):
            return nn.Sequential([layer for _ in range(depth) for layer in (nn.Dense(width), nn.relu)])

        def solve(seed, x, n, extra, width):
            keys = jax.random.split(jax.random.key(int(seed)), 2)
            big = flatten_dict(net(int(n + extra), int(width)).init(keys[1], x))
            for path, leaf in flatten_dict(net(int(n), int(width)).init(keys[0], x)).items():
                big[path] = leaf
            return np.array([float(sum(v.size for v in big.values())), n + extra])
        """,
    ],
    "init_zero": [
        """
        import torch

        def solve(layer):
            for name in ("weight", "bias"):
                if getattr(layer, name, None) is not None:
                    torch.nn.init.zeros_(getattr(layer, name))
        """,
        """
        def solve(layer):
            for parameter in layer.parameters(recurse=False):
                parameter.data.fill_(0.0)
            return layer
        """,
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [(n, i) for n, codes in RIGHT.items() for i in range(len(codes))])
def test_right_answers_of_other_kinds_pass(name, number, tmp_path):
    file = tmp_path / "answer.py"
    file.write_text(textwrap.dedent(RIGHT[name][number]))
    lesson = TAUGHT[name]
    verdict = grade(lesson, load(file, lesson.parameters), trials=2, seed=1)
    assert verdict.passed, str(verdict)


WRONG = {
    # (lesson, right answer number): what is changed in it → the mistakes it must be recognised as
    ("freeze_first_dense", 0): [
        ('path[0].key == "Dense_0"', 'path[0].key == "dense_0"', "`dense_0` for `Dense_0`"),
        ('path[0].key == "Dense_0"', 'path[-1].key == "kernel"', "every kernel replaced instead of one"),
        (
            'path[0].key == "Dense_0"',
            'path[1].key == "kernel" and path[0].key == "Dense_0"',
            "the bias dropped",
        ),
        ("norm(params)", "norm(state.params)", "the norm taken after the step"),
        (".squeeze(-1)", "", "the prediction not squeezed"),
        (
            "x = nn.relu(nn.Dense(8)(x))\n        return nn.Dense(1)(x)",
            "return nn.Dense(1)(nn.relu(nn.Dense(8)(x)))",
            "the layers made inside out",
        ),
        (
            "tx=optax.sgd(lr)",
            "tx=optax.chain(optax.sgd(lr), ZERO)",
            "updates zeroed where gradients were asked",
        ),
    ],
    ("zero_last_layer", 0): [
        ("layers_{n - 1}", "layers_{n}", "off by one in the layer name"),
        (
            '("params", f"layers_{n - 1}", "kernel")',
            '(f"layers_{n - 1}", "kernel")',
            "the outer `params` level lost",
        ),
        ("flat[path] * 0", "0.0", "a scalar where an array belongs"),
        ("flat[path] * 0", "jax.numpy.zeros(flat[path].shape)", "dtype lost by zeros(shape)"),
        (
            "flat[path] = flat[path] * 0",
            "flat = {p: v * (p[-1] != 'kernel') for p, v in flat.items()}",
            "every kernel replaced instead of one",
        ),
    ],
    ("partial_init", 0): [
        ("init(k2, x)", "init(k1, x)", "both inits from one key"),
        ('{"params": big["params"] | little["params"]}', "big", "nothing copied"),
        ('{"params": big["params"] | little["params"]}', "big | little", "the outer `params` level lost"),
        ('little["params"]}', "{k: v for k, v in little['params'].items() if k != 'Dense_0'}}", "off by one"),
    ],
    ("init_zero", 0): [
        ('("weight", "bias")', '["weight"]', "the bias dropped or left as it was"),
        (
            "torch.nn.init.zeros_(getattr(layer, name))",
            "getattr(layer, name).mul_(0)",
            "the edit recorded by autograd",
        ),
        (
            "torch.nn.init.zeros_(getattr(layer, name))",
            "getattr(layer, name).data = torch.zeros(getattr(layer, name).shape)",
            "dtype lost by zeros(shape)",
        ),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "edit"),
    [(n, i, edit) for (n, i), edits in WRONG.items() for edit in range(len(edits))],
)
def test_wrong_answers_written_otherwise_are_recognised(name, number, edit, tmp_path):
    old, new, mistake = WRONG[name, number][edit]
    code = textwrap.dedent(RIGHT[name][number])
    assert old in code
    mask = "lambda tree: {k: jax.tree.map(lambda _: k == 'Dense_0', tree[k]) for k in tree}"
    zero = f"optax.masked(optax.set_to_zero(), {mask})"
    file = tmp_path / "answer.py"
    file.write_text(code.replace(old, new.replace("ZERO", zero)))
    verdict = grade(TAUGHT[name], load(file, TAUGHT[name].parameters), trials=2, seed=1)
    assert not verdict.passed
    assert any(like.mistake.name.startswith(mistake) for like in verdict.likeness), str(verdict)


def test_two_mistakes_at_once_are_each_named_where_they_show():
    @torch.no_grad()
    def solve(layer):
        layer.weight.mul_(0)
        layer.bias.mul_(0)

    verdict = grade(TAUGHT["init_zero"], solve, trials=1)
    names = {like.mistake.name for like in verdict.likeness if not like.everywhere}
    assert "multiplied by zero" in names
    assert "It behaves on input" in str(verdict)


def test_an_unheard_of_answer_is_like_none():
    verdict = grade(
        TAUGHT["kernel_replace"],
        lambda seed, x, features, value: np.full((len(x), int(features)), 99.0),
        trials=1,
    )
    assert not verdict.likeness
    assert "like any known mistake" in str(verdict)


def test_whole_numbers_for_floats_and_wrong_shapes_are_differences():
    zero_last = TAUGHT["zero_last_layer"]
    right = lambda seed, x, n, f: np.ones((len(x), int(f)))
    assert grade(zero_last, right, trials=1).passed
    assert not grade(zero_last, lambda *args: right(*args).astype(int), trials=1).passed
    assert not grade(zero_last, lambda *args: right(*args)[0], trials=1).passed
    assert not grade(zero_last, lambda *args: None, trials=1).passed


def test_an_argument_edited_in_place_is_seen():
    def solve(seed, x, n, f):
        x[0] = 0
        return np.ones((len(x), int(f)))

    verdict = grade(TAUGHT["zero_last_layer"], solve, trials=1)
    assert "the arguments: edited in place" in verdict.failures[0].got


def test_flax_is_as_it_was_after_grading():
    before = linen.Module.init_with_output, linen.Module.apply, sys.getprofile()
    lesson = find("kernel_replace")
    lesson.observe(lesson.mistakes[0].forms[0], draw(lesson, trials=1, seed=0)[0])
    assert (linen.Module.init_with_output, linen.Module.apply, sys.getprofile()) == before


def test_an_observation_equals_itself():
    lesson = TAUGHT["kernel_replace"]
    seen = lesson.observe(lesson.reference, draw(lesson, trials=1, seed=1)[0])
    assert differences(seen, seen) == []


# -- files

PARAMETERS = ("seed", "x")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def solve(seed, x:\n    pass", "answer.py, line 1: SyntaxError"),
        (
            "x = 1\ny = 1 / 0\ndef solve(seed, x): pass",
            "answer.py, line 2: ZeroDivisionError while the file was run",
        ),
        ("import sys\nsys.exit()", "answer.py, line 2: SystemExit"),
        ("\ndef solved(seed, x): pass", "answer.py has no function `solve`; solved is on line 2"),
        ("", "answer.py has no function `solve`"),
        ("solve = 3", "answer.py: `solve` is an int, not a function"),
        ("\n\ndef solve(seed): pass", "answer.py, line 3: solve(seed) cannot be called as solve(seed, x)"),
        ("def solve(seed, x, y): pass", "missing a required argument: 'y'"),
    ],
)
def test_files_that_hold_no_answer(code, says, tmp_path):
    file = tmp_path / "answer.py"
    file.write_text(code)
    with pytest.raises(BadArgument) as error:
        load(file, PARAMETERS)
    assert says in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadArgument, match=r"cannot read .*nowhere\.py: No such file"):
        load(tmp_path / "nowhere.py", PARAMETERS)
    with pytest.raises(BadArgument, match="cannot read"):
        load(tmp_path, PARAMETERS)


def test_a_file_is_run_as_a_module_and_read_anew(tmp_path):
    file = tmp_path / "answer.py"
    file.write_text("def solve(seed, x): return 1\nif __name__ == '__main__': raise SystemExit")
    assert load(file, PARAMETERS)(0, 0) == 1
    file.write_text("def solve(seed, x): return 2")
    assert load(file, PARAMETERS)(0, 0) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["answer.py"]


# -- the command


def run(*args):
    return CliRunner().invoke(cli, ["lesson", *map(str, args)])


def test_the_list():
    result = run()
    assert result.exit_code == 0 and all(name in result.stdout for name in NAMES)
    assert [row["name"] for row in json.loads(run("--json").stdout)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_shown_with_a_run(name):
    result = run(name, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "The problem." in result.stdout and "result: " in result.stdout
    assert f"paramend lesson {name} --solution" in result.stdout
    shown = json.loads(run(name, "--json", "--seed", 1).stdout)
    assert set(shown["run"]["inputs"]) == set(find(name).parameters) and shown["run"]["facts"]
    # What solves it is shown on request alone: neither the reference nor a call of Paramend nor the mistakes.
    for text in (result.stdout, json.dumps(shown)):
        assert "pm." not in text and f"def {name}" not in text and find(name).mistakes[0].why not in text
    solved = run(name, "--solution")
    assert solved.exit_code == 0 and f"def {name}(" in solved.stdout and "The Paramend way." in solved.stdout
    shown = json.loads(run(NAMES.index(name) + 1, "--json", "--solution").stdout)
    assert shown["name"] == name and f"def {name}(" in shown["reference"] and shown["mistakes"]


def test_the_shown_result_is_that_of_the_reference():
    shown = json.loads(run("kernel_replace", "--json").stdout)
    case = draw(find("kernel_replace"), trials=1, seed=0)[0]
    assert shown["run"]["result"] == sketch(lessons.kernel_replace(*case.args))


def test_grading_a_file(tmp_path):
    file = tmp_path / "answer.py"
    file.write_text("def solve(layer):\n    print('talk')\n    layer.weight.data.zero_()\n")
    result = run("init_zero", "--grade", file)
    assert result.exit_code == 1
    assert "talk" not in result.stdout and "talk" in result.stderr
    assert "answer.py, line 3" in result.stdout and "the bias dropped" in result.stdout
    data = json.loads(run("init-zero", "--grade", file, "--json").stdout)
    assert data["passed"] is False and data["failures"]
    file.write_text(textwrap.dedent(RIGHT["init_zero"][0]))
    result = run("init_zero", "--grade", file)
    assert (result.exit_code, result.stderr) == (0, "") and "passed on 25 inputs" in result.stdout


def test_an_answer_without_an_end_is_stopped_with_all_that_it_started(tmp_path):
    file, pids = tmp_path / "answer.py", tmp_path / "pids"
    file.write_text(f"""
import os, subprocess, time
helper = subprocess.Popen(["sleep", "600"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{helper.pid}}")
print("begun", flush=True)
while True:
    time.sleep(1)
""")
    result = run("init_zero", "--grade", file, "--timeout", 15)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("begun\n") and "took longer than 15 s" in result.stderr
    assert "hint: --timeout 600" in result.stderr
    for pid in pids.read_text().split():
        stat = Path(f"/proc/{pid}/stat")  # a child that nobody waits for stays as a zombie
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_answer_that_ends_its_process(tmp_path):
    (tmp_path / "answer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    result = run("init_zero", "--grade", tmp_path / "answer.py")
    assert result.exit_code == 2 and "its process was ended by SIGKILL" in result.stderr
    (tmp_path / "answer.py").write_text("def solve(layer):\n    return input()")
    result = run("init_zero", "--grade", tmp_path / "answer.py")
    assert result.exit_code == 1 and "EOFError" in result.stdout  # it waits for nobody


def test_what_cannot_be_done_exits_with_2(tmp_path):
    result = run("init_zer")
    assert result.exit_code == 2 and "did you mean init_zero?" in result.stderr and not result.stdout
    assert run("--grade", tmp_path / "a.py").exit_code == 2
    result = run("init_zero", "--grade", tmp_path / "a.py")
    assert result.exit_code == 2 and "a.py" in result.stderr


def test_a_missing_framework_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'paramend\[torch\]'"):
        find("init_zero")
    result = run("init_zero")
    assert result.exit_code == 2 and "pip install 'paramend[torch]'" in result.stderr


def test_importing_the_lessons_imports_no_framework():
    code = "import sys, paramend.lessons as l; print({'jax', 'torch'} & {*sys.modules}, *l.__all__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["set()", *sorted(NAMES)]
