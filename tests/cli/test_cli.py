"""The command line: what is printed where, exit statuses, and that nothing is imported that is not needed."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli import _ui
from paramend.cli.main import ROWS, cli, edits
from paramend.formats.safetensors import SafetensorsFile
from paramend.leaves.specs import Spec
from paramend.reports.progress import Meter
from support.numerics import assert_close
from support.sessions import run_session
from support.writing import write_header

COMMAND = [sys.executable, "-m", "paramend"]


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


def read(path):
    with SafetensorsFile(path) as file:
        return {file.header.entries[n].name: np.array(file.read(n)) for n in file.index.numbers}


@pytest.fixture
def model(tmp_path):
    tree = {
        f"layers.{i}.{kind}": np.full(shape, i, "float32")
        for i in range(11)
        for kind, shape in [("w", (2, 3)), ("b", (3,))]
    }
    tree |= {"head.w": np.array([[-1, np.nan], [np.inf, 0]], ml_dtypes.bfloat16), "step": np.array(3)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tree, path, metadata={"format": "np"})
    return path


# ---- show --------------------------------------------------------------------------------------------------------


def test_show_folds_layers_that_agree(model):
    done = run("show", model)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["head.w", "layers.{0..10}.b", "layers.{0..10}.w"]
    assert [line.split()[1:3] for line in lines[2:4]] == [["11", "×"]] * 2
    assert lines[-2:] == ["24 leaves, 104 scalars, 412 B", "metadata  format=np"]


def test_show_lists_leaves_in_natural_order(model):
    done = run("show", model, "--all")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["path", "dtype", "shape", "size"]
    assert lines[1] == "head.w       bfloat16  [2,2]   8 B"
    assert [line.split()[0] for line in lines[2::2][:11]] == [f"layers.{i}.b" for i in range(11)]
    assert lines[-3:] == ["", "24 leaves, 104 scalars, 412 B", "metadata  format=np"]


def test_show_a_selection(model):
    done = run("show", model, "layers[-2:]/w", "--all")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["layers.9.w", "layers.10.w"]
    assert "2 of 24 leaves, 12 scalars, 48 B" in done.stdout


def test_show_stats(model):
    lines = run("show", model, "**/w", "--stats").stdout.splitlines()
    assert lines[0].split()[4:] == ["min", "max", "mean", "std", "norm", "zeros", "nans", "infs"]
    assert lines[1].split()[5:] == ["-1", "inf", "-0.5", "0.5", "1", "1", "1", "1"]


def test_show_stats_of_a_selection_in_json(model):
    done = run("show", model, "head.w", "--stats", "--json")
    data = json.loads(done.stdout, parse_constant=pytest.fail)
    measures = {"min": -1.0, "max": "Infinity", "mean": -0.5, "std": 0.5, "norm": 1.0}
    assert data["leaves"] == [
        {
            "path": "head.w",
            "dtype": "bfloat16",
            "shape": [2, 2],
            "nbytes": 8,
            "stats": {**measures, "zeros": 1, "nans": 1, "infs": 1},
        }
    ]
    assert data["metadata"] == {"format": "np"}
    assert (data["count"], data["size"], data["nbytes"]) == (1, 4, 8)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "float8_e5m2", "int64", "uint8", "bool", "complex64"]
)
def test_stats_are_those_of_the_whole_leaf(tmp_path, monkeypatch, dtype):
    from paramend.evidence import measures

    monkeypatch.setattr(measures, "_RUN", 7)
    values = np.random.default_rng(0).normal(1000, 3, 100)
    array = (values > 1000 if dtype == "bool" else values % 100).astype(getattr(ml_dtypes, dtype, dtype))
    safetensors.numpy.save_file({"w": array}, tmp_path / "m")
    stats = json.loads(run("show", tmp_path / "m", "--stats", "--json").stdout)["leaves"][0]["stats"]
    wide = (np.abs(array) if dtype == "complex64" else array).astype("float64")
    expected = [wide.min(), wide.max(), wide.mean(), wide.std(), np.linalg.norm(wide), (wide == 0).sum(), 0, 0]
    for found, wanted in zip(stats.values(), expected, strict=True):
        assert_close(found, wanted, terms=100, scale=1000)


@pytest.mark.parametrize("shards", [1, 2])
def test_stats_of_a_directory(shards, tmp_path):
    leaves = {"a": np.arange(4, dtype="float32"), "b": np.ones((2, 2), "float32")}
    pm.save(leaves, tmp_path / "m", max_shard_size=16 * 3 - 16 * shards)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == shards
    rows = json.loads(run("show", tmp_path / "m", "--stats", "--json").stdout)["leaves"]
    assert [(row["path"], row["stats"]["max"], row["stats"]["mean"]) for row in rows] == [("a", 3, 1.5), ("b", 1, 1)]


def test_stats_of_nothing_and_of_the_unreadable(tmp_path):
    text = b'{"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"u":{"dtype":"I2","shape":[4],"data_offsets":[0,1]}}'
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    empty, unknown = json.loads(run("show", tmp_path / "m", "--stats", "--json").stdout)["leaves"]
    assert empty["stats"]["mean"] is None and empty["stats"]["zeros"] == 0
    assert unknown["stats"] is None
    assert run("show", tmp_path / "m", "--stats").stdout.splitlines()[1].split()[5:] == ["-"] * 5 + ["0"] * 3


def test_names_cannot_command_the_terminal(tmp_path):
    safetensors.numpy.save_file({"a\x1b[2J\n": np.zeros(1)}, tmp_path / "m", metadata={"k": "\x1b]0;x\x07"})
    for args in (
        ["show", tmp_path / "m"],
        ["zero", tmp_path / "m", "**", "--dry-run"],
        ["show", tmp_path / "m", "nope"],
    ):
        output = run(*args).output
        assert "\x1b" not in output and "\x07" not in output
        assert "\\x1b" in output


# ---- editing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["zero", "layers.3.w"], np.zeros((2, 3), "float32")),
        (["fill", "layers.3.w", "0.5"], np.full((2, 3), 0.5, "float32")),
        (["fill", "layers.3.w", "-0.5"], np.full((2, 3), -0.5, "float32")),
        (["fill", "layers.3.w", "-.5e1"], np.full((2, 3), -5, "float32")),
        (["fill", "layers.3.w", "-inf"], np.full((2, 3), -np.inf, "float32")),
        (["scale", "layers.3.w", "-2"], np.full((2, 3), -6, "float32")),
        (["multiply", "layers.3.w", "-2"], np.full((2, 3), -6, "float32")),
        (["add", "layers.3.w", "-2.5"], np.full((2, 3), 0.5, "float32")),
        (["clip", "layers.3.w", "-1", "1"], np.full((2, 3), 1, "float32")),
        (["cast", "layers.3.w", "bfloat16"], np.full((2, 3), 3, ml_dtypes.bfloat16)),
        (["noise", "layers.3.w", "0", "--seed", "1"], np.full((2, 3), 3, "float32")),
    ],
)
def test_every_verb(model, tmp_path, args, expected):
    verb, *rest = args
    done = run(verb, model, *rest, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    before, after = read(model), read(tmp_path / "out")
    assert after["layers.3.w"].dtype == expected.dtype
    assert after.pop("layers.3.w").tobytes() == expected.tobytes()
    assert {k: v.tobytes() for k, v in after.items()} == {k: before[k].tobytes() for k in after}
    assert done.stderr.startswith(f"wrote {tmp_path / 'out'}: ")


def test_reinit_draws_with_a_seed(model, tmp_path):
    for name, more in [("a", []), ("b", ["--seed", "0"]), ("c", ["--seed", "2"])]:
        done = run("reinit", model, "layers.3.w", "he_uniform", *more, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
    a, b, c = (read(tmp_path / name)["layers.3.w"] for name in "abc")
    assert (a == b).all() and not (a == c).any()
    assert (abs(a) <= (6 / 3) ** 0.5).all() and len({*a.ravel().tolist()}) == 6
    state = {"layers.3.w": torch.tensor(read(model)["layers.3.w"])}  # named as in torch, (out, in) as there
    assert pm.at(state, "**").reinit("he_uniform")["layers.3.w"].numpy().tobytes() == a.tobytes()
    done = run("reinit", model, "layers.3.w", "he", "-o", tmp_path / "d")
    assert done.exit_code == 2 and "'he' is not an initializer; write" in done.stderr


def test_arithmetic_takes_another_file(model, tmp_path):
    """The sum of a model and what another holds under the same paths: task vectors, as they are called."""
    before = read(model)
    other = {name: np.full(leaf.shape, 0.5, leaf.dtype) for name, leaf in before.items() if name.endswith(".w")}
    safetensors.numpy.save_file(other, tmp_path / "delta.safetensors")
    done = run("add", model, "layers/*/w", tmp_path / "delta.safetensors", "-o", tmp_path / "out", "--record")
    assert done.exit_code == 0, done.output
    after = read(tmp_path / "out")
    for name, leaf in before.items():
        expected = leaf + np.float32(0.5) if re.fullmatch(r"layers\.\d+\.w", name) else leaf
        assert after[name].tobytes() == expected.tobytes()
    assert pm.record(tmp_path / "out").recipe.endswith('add: {at: "layers/*/w", from: "delta.safetensors"}')
    np.save(tmp_path / "row.npy", np.array([1, 2, 3], "float32"))
    assert run("multiply", model, "layers.3.w", tmp_path / "row.npy", "-o", tmp_path / "row").exit_code == 0
    assert read(tmp_path / "row")["layers.3.w"].tolist() == (before["layers.3.w"] * [1, 2, 3]).tolist()
    done = run("add", model, "layers.3.w", f"{tmp_path / 'delta.safetensors'}:layers.3.b", "-o", tmp_path / "no")
    assert done.exit_code == 2 and "layers.3.b" in done.stderr


def test_what_changes_specs_cannot_be_done_in_place(model):
    before = model.read_bytes()
    for args in (["cast", model, "layers.3.w", "float16"], ["delete", model, "layers.3.w"]):
        assert "--in-place" not in run(args[0], "--help").stdout
        done = run(*args, "--in-place")
        assert done.exit_code == 2 and "hint: " in done.stderr, done.output
    assert model.read_bytes() == before


def test_noise_depends_on_the_seed(model, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert run("noise", model, "**/w", "0.1", "--seed", seed, "-o", tmp_path / name).exit_code == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "order", [["-o", "OUT", "F", "S", "-0.5"], ["F", "S", "-0.5", "-o", "OUT"], ["-o", "OUT", "--", "F", "S", "-0.5"]]
)
def test_a_negative_number_is_no_option(model, tmp_path, order):
    given = {"OUT": tmp_path / "out", "F": model, "S": "step"}
    done = run("scale", *(given.get(arg, arg) for arg in order))
    assert done.exit_code == 2  # of an int leaf -0.5 is no factor: it was read as a number, and as the factor
    assert "int64 cannot hold -0.5" in done.stderr


def test_a_dry_run_shows_the_table_of_the_run_and_writes_nothing(model, tmp_path):
    args = ["scale", model, "**/[-1]/{w,b}", "0.5", "-o", tmp_path / "out"]
    dry = run(*args, "--dry-run")
    assert (dry.exit_code, dry.stderr) == (0, "dry run: nothing was written\n")
    assert not (tmp_path / "out").exists()
    assert run(*args).stdout == dry.stdout
    assert dry.stdout.splitlines() == [
        "path         spec          edit",
        "layers.10.b  float32[3]    multiply(0.5)",
        "layers.10.w  float32[2,3]  multiply(0.5)",
        "",
        "2 of 24 leaves change",
    ]
    again = run(*args, "--dry-run")
    assert again.exit_code == 2
    assert "already exists" in again.stderr
    assert run(*args[:-2], "--dry-run").stdout == dry.stdout


def test_json_of_a_run_and_of_a_dry_run(model, tmp_path):
    args = ["zero", model, "head.w", "-o", tmp_path / "out", "--json"]
    dry, wet = (json.loads(run(*args, *more).stdout) for more in (["--dry-run"], []))
    assert (dry["dry_run"], wet["dry_run"]) == (True, False)
    assert dry["path"] == wet["path"] == str(tmp_path / "out")
    assert dry["changed"] == wet["changed"]
    assert dry["changed"][0]["edits"] == ["zero()"]
    assert wet["kept"] == 23
    assert wet["bytes_copied"] + wet["bytes_computed"] == model.stat().st_size


def test_json_of_numbers_that_json_lacks(model):
    done = run("fill", model, "head.w", "nan", "--dry-run", "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail)["changed"][0]["edits"] == ["fill(nan)"]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["zero", "MODEL", "layers", "-o", "OUT"], "names a subtree of 22 leaves"),
        (["zero", "MODEL", "**/W", "-o", "OUT"], "hint: did you mean"),
        (["zero", "MODEL", "layers[", "-o", "OUT"], "    layers[\n"),
        (["zero", "MODEL", "layers[99]/w", "-o", "OUT"], "out of range"),
        (["show", "MODEL", "nope"], "matches none of 24 leaves"),
        (["show", "NOPE"], "no such file"),
        (["show", "VOID"], "a directory without a checkpoint: it is empty"),
        (["show", "EMPTY"], "the file is empty"),
        (["show", "TEXT"], "are those of a known format"),
        (["zero", "MODEL", "**", "-o", "MODEL", "--force"], "is the file that is being read"),
        (["zero", "MODEL", "**", "-o", "EMPTY"], "--force"),
        (["zero", "MODEL", "**", "-o", "FOLDER/no/out"], "mkdir -p"),
        (["fill", "MODEL", "step", "1.5", "-o", "OUT"], "step: "),
    ],
)
def test_refusals_are_short_and_their_status_is_2(model, tmp_path, args, message):
    (tmp_path / "void").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello, this is no checkpoint, but it is long enough\n")
    given = {"MODEL": str(model), "OUT": f"{tmp_path}/out", "NOPE": f"{tmp_path}/nope", "VOID": f"{tmp_path}/void"}
    given |= {"EMPTY": f"{tmp_path}/empty", "TEXT": f"{tmp_path}/text", "FOLDER/no/out": f"{tmp_path}/no/out"}
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run(*(given.get(arg, arg) for arg in args))
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.match(r"error\[[a-z-]+\]: ", done.stderr)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sohw", "x"], "There is no command 'sohw'. Did you mean 'show'?"),
        (["xyzzy"], "There is no command 'xyzzy'. To list them: paramend help"),
        (["show"], "Missing argument 'PATH'"),
        (["show", "m", "--jsn"], "--json"),
        (["zero", "MODEL", "step"], "-o OUT or --in-place is needed"),
        (["fill", "MODEL", "step", "-o", "out"], "Missing argument"),
        (["fill", "MODEL", "step", "three", "-o", "out"], "'three' is not a number"),
        (["scale", "MODEL", "step", "three", "-o", "out"], "'three' is not a number, nor an existing file"),
        (["clip", "MODEL", "step", "1", "-o", "out"], "Missing argument 'HI'"),
        (["replace", "MODEL"], "There is no command 'replace'. Did you mean 'set'?"),
        (["mutliply", "MODEL"], "There is no command 'mutliply'. Did you mean 'multiply'?"),
        (["apple", "MODEL"], "Did you mean 'apply'?"),
        (["help", "clmp"], "Did you mean 'clip'?"),
        (["noise", "MODEL", "step", "0.1", "--seed", "-1", "-o", "out"], "-1 is negative"),
        (["zero", "MODEL", "step", "1", "-o", "out"], '"1" matches none of 24 leaves'),
        (["delete", "MODEL", "step"], "-o OUT is needed."),
        (["rename", "MODEL", "step", "other"], "-o OUT is needed."),
        (["cast", "MODEL", "step", "int32"], "-o OUT is needed."),
        (["apply", "FIX", "MODEL"], "-o OUT or --in-place is needed."),
    ],
)
def test_usage_errors(model, args, message):
    done = run(*(str(model) if arg == "MODEL" else arg for arg in args))
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_an_error_of_the_system_is_no_traceback(model, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    done = run("show", model, "--stats")
    assert (done.exit_code, done.stderr) == (2, "error: Input/output error\n")


def test_a_missing_framework_breaks_only_its_command(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "paramend.cli.learn", None)
    done = run("lesson")
    assert done.exit_code == 2
    assert "hint: pip install 'paramend[demo]'" in done.stderr
    assert run("show", model).exit_code == 0
    assert run("--help").exit_code == 0


# ---- help --------------------------------------------------------------------------------------------------------


def test_help_and_version():
    text = run("--help").stdout
    assert run("help").stdout == text
    for row in (*ROWS, *edits()):
        name = ", ".join((row.name, *row.aliases))
        assert re.search(rf"^  {name} +{re.escape(row.says[:30])}", text, re.MULTILINE)
    for name in ("show", "zero", "fill", "scale", "multiply", "add", "clip", "reinit", "noise", "cast", "rename"):
        done = run(name, "-h")
        assert run("help", name).stdout == done.stdout
        assert done.exit_code == 0
        assert "Exit status:" in done.stdout
    assert re.fullmatch(r"paramend, version \d+\.\d+.*\n", run("--version").stdout)


# ---- the process -------------------------------------------------------------------------------------------------


def test_showing_and_editing_import_no_framework(model, tmp_path):
    code = """
        import sys
        from paramend.cli.main import cli
        model, out = sys.argv[1:]
        for args in (["show", model, "--stats"], ["zero", model, "**", "-o", out], ["-h"]):
            try:
                cli(args)
            except SystemExit as end:
                assert not end.code, end.code
        heavy = {"jax", "flax", "torch", "optax", "rich", "sklearn", "safetensors"} & sys.modules.keys()
        assert not heavy, heavy
    """
    command = [sys.executable, "-c", textwrap.dedent(code), model, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error(model):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([*COMMAND, "show", model], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout(model):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "show", model], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_nothing(tmp_path, how, status):
    header = write_header({"w": Spec((400_000_000,), "float32")})
    (tmp_path / "m").write_bytes(header.to_bytes())
    os.truncate(tmp_path / "m", header.nbytes + header.data_nbytes)  # sparse: it costs no disk
    command = [*COMMAND, "noise", tmp_path / "m", "w", "1", "-o", tmp_path / "out"]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with worker:
        while worker.poll() is None and len(list(tmp_path.iterdir())) == 1:
            time.sleep(0.001)
        worker.send_signal(how)
        errors = worker.stderr.read()
    assert (worker.returncode, errors) == (status, f"stopped by {how.name}: nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_amid_generated_code(tmp_path, how, status):
    """Libraries run texts as code while they are imported, and CPython remembers a KeyboardInterrupt in there."""
    code = f"""
    from paramend.cli import main

    def get_command(*_):
        exec("import os; os.kill(os.getpid(), {int(how)})\\nfor i in range(1000): pass")

    main._Group.get_command = get_command
    main.main()
    """
    (tmp_path / "amid.py").write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, "-m", "amid", "show"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, f"stopped by {how.name}: nothing was written\n")


def test_a_signal_that_was_lost_is_heeded_at_the_next_step(monkeypatch):
    monkeypatch.setattr(_ui, "stopped", [signal.SIGTERM])
    with _ui.bar("writing") as progress, pytest.raises(SystemExit) as error:
        Meter(progress, 10).advance(1)
    assert error.value.code == 143


def on_a_terminal(args, **env):
    """The status and the output of a command whose stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | env
    code = "from paramend.cli import _ui, main; _ui._PATIENCE = 0; main.main()"  # a bar at once
    command = [sys.executable, "-c", code, *map(str, args)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=env) as worker:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            output += piece
    os.close(ours)
    return worker.returncode, output.decode()


def test_colour_and_bars_are_for_terminals(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros(2_000_000, "float32")}, tmp_path / "m")
    args = ["noise", tmp_path / "m", "w", "1", "-o", tmp_path / "out", "--force"]
    status, output = on_a_terminal(args)
    assert status == 0
    assert "writing out" in output and "\x1b[" in output
    status, output = on_a_terminal(["show", tmp_path / "m"], NO_COLOR="1")
    assert status == 0 and "\x1b[" not in output
    status, output = on_a_terminal(["show", tmp_path / "nope"])
    assert status == 2 and "\x1b[31m" in output
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1


def test_names_beyond_the_encoding_of_stdout(tmp_path):
    safetensors.numpy.save_file({"gewicht_ü_重": np.zeros(1)}, tmp_path / "m")
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*COMMAND, "show", tmp_path / "m"], capture_output=True, env=env)
    assert done.returncode == 0
    assert b"gewicht_\xfc_\\u91cd" in done.stdout


# ---- the docs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sessions_in_the_docs(tmp_path):
    """Runs every console block of docs/cli.md, in order, in one folder, and compares what is printed."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    blocks = re.findall(r"^(````?)console\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert sum(run_session(block, tmp_path) for _, block in blocks) > 5


def test_in_place_history_and_undo(tmp_path):
    import numpy as np
    from click.testing import CliRunner
    from safetensors.numpy import load_file, save_file

    from paramend.cli.main import cli

    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": np.ones((2, 2), np.float32), "fc.bias": np.ones(2, np.float32)}, path)
    before = path.read_bytes()

    def run(*command: str) -> str:
        result = CliRunner().invoke(cli, list(command))
        assert result.exit_code == 0, result.output
        return result.output

    assert "would be written in place" in run("zero", str(path), "fc.bias", "--in-place", "--dry-run")
    assert path.read_bytes() == before
    assert "8 B written in place" in run("zero", str(path), "fc.bias", "--in-place")
    assert load_file(path)["fc.bias"].tolist() == [0.0, 0.0]
    assert "fc.bias" in run("history", str(path)) or "zero" in run("history", str(path))
    run("undo", str(path))
    assert path.read_bytes() == before
    for wrong in (["--in-place", "-o", "x"], []):
        assert CliRunner().invoke(cli, ["zero", str(path), "fc.bias", *wrong]).exit_code == 2
