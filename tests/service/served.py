"""A service over real loopback HTTP: uvicorn in a thread, and a tiny model behind it."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import uvicorn

from mechsafety.service import bound_socket, build_app


@contextmanager
def running(model, guard=None, *, grace=20, **options):
    """The service at a free port: ``url``, ``app`` and ``server``; it stops as it should at the end."""
    app = build_app(model, guard, **options)
    bound = bound_socket("127.0.0.1", 0, token=False)
    config = uvicorn.Config(
        app, http="h11", log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=grace
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        yield SimpleNamespace(url=url, app=app, server=server, thread=thread)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


def until(true, seconds=20.0):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Slow:
    """Holds back every forward of a model until it is let go, so that tests decide what runs when."""

    def __init__(self, model, monkeypatch):
        self.go, self.calls = threading.Semaphore(0), 0
        self.free = False
        feed = model.backend.feed

        def slow(*args, **kwargs):
            self.calls += 1
            if not self.free:
                assert self.go.acquire(timeout=30)
            return feed(*args, **kwargs)

        monkeypatch.setattr(model.backend, "feed", slow)

    def release(self):
        self.free = True
        for _ in range(1000):
            self.go.release()
