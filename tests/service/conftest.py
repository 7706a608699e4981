"""Fixtures of the service: a tiny model that waits at every forward, one service and one client."""

import httpx
import pytest
from served import Slow, running

from mechsafety.service import ServiceLimits


@pytest.fixture
def slow(llama, monkeypatch):
    made = Slow(llama, monkeypatch)
    yield made
    made.release()


@pytest.fixture(scope="module")
def service(llama):
    with running(llama, limits=ServiceLimits(body_bytes=2000, prompt_tokens=40, new_tokens=20)) as made:
        yield made


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=30) as made:
        yield made
