"""The device of a test: the host's in a plain run, an accelerator where `-m gpu` asks for one."""

import pytest


@pytest.fixture(params=["host", pytest.param("accelerator", marks=pytest.mark.gpu)])
def where(request):
    return request.param


@pytest.fixture
def device(where):
    """A device of JAX: on the host not the default one, so that what is merely left to JAX goes elsewhere."""
    import jax

    if where == "host":
        return jax.devices("cpu")[-1]
    found = [device for device in jax.devices() if device.platform != "cpu"]
    if not found:
        pytest.fail(f"this test needs an accelerator, and JAX sees {jax.devices()[0].device_kind} alone", pytrace=False)
    return found[-1]


@pytest.fixture
def home(where):
    """A device of torch."""
    import torch

    if where == "host":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail(f"this test needs an accelerator, and torch {torch.__version__} sees none", pytrace=False)
    return torch.device("cuda", torch.cuda.device_count() - 1)
