"""One thread for networks this small, and no hub."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def offline(monkeypatch):
    """Neither transformers nor datasets asks the hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
