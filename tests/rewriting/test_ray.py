"""Jobs done by a Ray of two workers on this machine."""

import os
import signal

import numpy as np
import pytest

import paramend as pm
from paramend.rewriting import jobs
from support.rewrites import VERBS, content, edited, left, model

pytestmark = [
    pytest.mark.far,
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),  # by JAX, if other tests imported it
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("verb", ["edit", "graft", "merge", "fold", "dequantize", "deepen"])
def test_ray_makes_what_one_run_makes(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_COMPUTED", 1)
    one = VERBS[verb](tmp_path).save(tmp_path / "one")
    events = []
    many = VERBS[verb](tmp_path).save(tmp_path / "out", engine="ray", workers=2, progress=events.append)
    assert content(tmp_path / "out") == content(tmp_path / "one") and not left(tmp_path)
    assert str(many.plan) == str(one.plan) and many.bytes_computed == one.bytes_computed
    assert events[-1].done == events[-1].total


def test_functions_of_the_program_go_along(tmp_path):
    factor = np.float32(3)
    pm.at(pm.open(model(tmp_path)), "**.fc.weight").apply(lambda x: x * factor).save(tmp_path / "out", engine="ray")
    old, new = (pm.open(tmp_path / name)["layers.1.fc.weight"] for name in ("model", "out"))
    assert np.array_equal(old * factor, new)


def test_an_error_of_a_worker_is_told_once(tmp_path):
    def refuse(x):
        raise pm.errors.SpecMismatch("this leaf is not for me")

    with pytest.raises(pm.errors.SpecMismatch, match=r"^this leaf is not for me$"):
        pm.at(pm.open(model(tmp_path)), "**.fc.weight").apply(refuse).save(tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists() and not left(tmp_path)


def test_a_killed_worker_is_replaced(tmp_path):
    """One of two workers ends amid a job, when others are done; its job is done again."""
    flag = tmp_path / "killed"

    def end_once(x):
        if x.flat[0] == 5 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x / 2

    pm.save(
        {f"layers.{n}.w": np.full((256, 256), n, "float32") for n in range(12)},
        tmp_path / "model/",
        max_shard_size="1MB",
    )
    pm.at(pm.open(tmp_path / "model"), "**").apply(end_once).save(tmp_path / "out", engine="ray", workers=2)
    assert flag.exists() and not left(tmp_path)
    new = pm.open(tmp_path / "out")
    assert all((new[f"layers.{n}.w"] == n / 2).all() for n in range(12))


def test_a_job_that_kills_its_workers_ends_with_an_error(tmp_path):
    def end(x):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(pm.errors.CannotWrite, match="3 workers were lost while they made the same part"):
        pm.at(pm.open(model(tmp_path)), "**.fc.weight").apply(end).save(tmp_path / "out", engine="ray", workers=2)
    assert not (tmp_path / "out").exists() and not left(tmp_path)


def test_what_was_begun_here_is_resumed_by_ray(tmp_path, monkeypatch):
    edited(pm.open(model(tmp_path))).save(tmp_path / "one")
    do = jobs.Hand.do
    with monkeypatch.context() as patch:
        patch.setattr(jobs.Hand, "do", lambda self, task: do(self, task) if task.number < 2 else fail())
        with pytest.raises(ZeroDivisionError):
            edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert len(left(tmp_path)) == 2
    edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True, engine="ray")
    assert content(tmp_path / "out") == content(tmp_path / "one") and not left(tmp_path)


def fail():
    raise ZeroDivisionError


@pytest.mark.parametrize("engine", ["ray", "ray://127.0.0.1:1"])
def test_an_address_where_nothing_answers(engine, tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(pm.errors.CannotWrite, match=r"no cluster of Ray answers at .*127.*: Connection refused"):
        edited(pm.open(model(tmp_path))).save(tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists() and not left(tmp_path)
