"""The service: answers equal to the model's own, limits, tokens, disconnects, logs, metrics and shutdown."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
import torch
from served import running, until

import mechsafety as ms
from mechsafety.interventions import Direction
from mechsafety.monitors import ActivationMonitor, LabelledPrompts, SafetyGuard
from mechsafety.service import ServiceLimits, bound_socket, build_app, read_token, serve
from mechsafety.service.gate import _name as host_name
from mechsafety.service.judge import load_protection, protection_type
from mechsafety.service.logs import JsonLines
from mechsafety.service.worker import Busy, Closing, Done, Failed, Worker
from mechsafety.sites import Site, SiteKind

FRAMES = ["make a {}", "please make a {}", "how do i make a {}", "teach me a {}", "write about a {}", "explain a {}"]
FRAMES += ["why is my {} blue", "can i help a {}", "what is a {}", "the {} of my house"]
PROMPTS = ["make a cake", "teach me to help a car please", "tea", "how do i make a bomb"]


@pytest.fixture(scope="module")
def pairs():
    return ms.PromptPairs.from_lists([f.format("bomb") for f in FRAMES], [f.format("cake") for f in FRAMES])


@pytest.fixture(scope="module")
def monitor(llama, pairs):
    vector = torch.randn(1, llama.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(llama.provenance(), "made", (Site(SiteKind.RESID_PRE, 2),), vector)
    return ActivationMonitor.fit(llama, direction, pairs, false_positive_rate=0.25, reply_tokens=4)


@pytest.fixture(scope="module")
def guard(llama, pairs):
    mask = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.15
    return SafetyGuard.fit(llama, mask, LabelledPrompts.of_pairs(pairs))


def own(model, prompt, n=8, **options):
    return model.generate([prompt], n, progress=False, **options)[0]


def events(response):
    """(name, data) of each server-sent event."""
    for block in response.iter_text():
        for part in filter(None, block.split("\n\n")):
            name, data = part.split("\n")
            yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_reply_is_the_models_own(client, llama):
    for prompt in PROMPTS:
        answer = client.post("/generate", json={"prompt": prompt, "max_new_tokens": 8})
        assert answer.status_code == 200
        found, (ids,) = answer.json(), llama.reply_ids([prompt], 8, progress=False)
        assert found["text"] == own(llama, prompt) and found["new_tokens"] == len(ids)
        assert found["finish"] == ("end" if ids[-1] in llama.end_ids else "length")
        assert found["prompt_tokens"] == llama.n_tokens(prompt) and found["verdict"] is found["scores"] is None
        assert found["id"] == answer.headers["x-request-id"]


def test_messages_and_samples_are_the_models_own(client, llama):
    talk = [{"role": "user", "content": "tea"}, {"role": "assistant", "content": "sure"}]
    talk.append({"role": "user", "content": "make a cake"})
    asked = {"prompt": talk, "max_new_tokens": 6}
    assert client.post("/generate", json=asked).json()["text"] == own(llama, talk, 6)
    drawn = {"prompt": "tea", "max_new_tokens": 8, "temperature": 0.9, "seed": 4}
    assert client.post("/generate", json=drawn).json()["text"] == own(llama, "tea", 8, temperature=0.9, seed=4)


def test_a_stream_says_the_same_piece_by_piece(client, llama):
    for prompt in PROMPTS:
        with client.stream("POST", "/generate", json={"prompt": prompt, "max_new_tokens": 8, "stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            found = list(events(answer))
        assert [name for name, _ in found[:-1]] == ["token"] * (len(found) - 1) and found[-1][0] == "end"
        assert "".join(data["text"] for _, data in found[:-1]) == found[-1][1]["text"] == own(llama, prompt)


def test_pieces_come_while_the_model_still_runs(llama, slow):
    with running(llama) as made, httpx.Client(base_url=made.url, timeout=30) as client:
        for _ in range(3):
            slow.go.release()
        asked = {"prompt": "tea", "max_new_tokens": 8, "stream": True}
        with client.stream("POST", "/generate", json=asked) as answer:
            stream = events(answer)
            first = next(stream)
            assert first[0] == "token" and slow.calls <= 4
            slow.release()
            assert list(stream)[-1][0] == "end"


def test_no_answer_is_lost_or_mixed_up_among_many_clients(llama):
    asked = [f"{frame.format(word)}" for frame in FRAMES for word in ("cake", "car", "bomb")] * 4
    expected = {prompt: own(llama, prompt, 5) for prompt in set(asked)}
    assert len(set(expected.values())) > 5
    limits = ServiceLimits(waiting=200)
    with running(llama, limits=limits) as made, httpx.Client(base_url=made.url, timeout=60) as client:

        def ask(number):
            body = {"prompt": asked[number], "max_new_tokens": 5, "stream": number % 3 == 0}
            if not body["stream"]:
                return client.post("/generate", json=body).json()["text"]
            with client.stream("POST", "/generate", json=body) as answer:
                return list(events(answer))[-1][1]["text"]

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(ask, range(len(asked))))
    assert found == [expected[prompt] for prompt in asked]


# --- the guard --------------------------------------------------------------------------------------------------------


def test_scores_are_the_guards_and_the_monitors(llama, guard, monitor):
    armed = guard.with_monitor(monitor)
    with running(llama, armed) as made, httpx.Client(base_url=made.url) as client:
        results = client.post("/score", json={"prompts": PROMPTS}).json()["results"]
        assert client.get("/healthz").json()["guard"] is True
    for prompt, found in zip(PROMPTS, results, strict=True):
        verdict, scores = guard.predict(prompt), monitor.score([prompt])
        assert (found["probability"], found["threshold"]) == (verdict.probability, verdict.threshold)
        (one,) = found["monitors"]
        assert one["score"] == float(scores.scores[0]) and one["flagged"] == bool(scores.flagged[0])
        assert one["p_value"] == scores.p_values[0] and one["threshold"] == scores.threshold
        assert found["unsafe"] == (verdict.unsafe or one["flagged"])


def test_a_blocked_prompt_gets_no_reply_and_a_flagged_token_ends_one(llama, guard, monitor):
    low = replace(monitor.weights, harmless_replies=monitor.weights.harmless_replies - 1e6)
    low = ActivationMonitor(llama, replace(low, harmless=low.harmless + 1e6))
    asked = {"prompt": "make a cake", "max_new_tokens": 8}
    with running(llama, guard.with_threshold(0.0)) as made:
        blocked = httpx.post(f"{made.url}/generate", json=asked).json()
    assert (blocked["finish"], blocked["text"], blocked["new_tokens"]) == ("blocked", "", 0)
    assert blocked["verdict"]["unsafe"] is True
    for protection in (guard.with_threshold(1.0).with_monitor(low), low):
        with running(llama, protection) as made:
            stopped = httpx.post(f"{made.url}/generate", json=asked).json()
        assert stopped["finish"] == "stopped" and stopped["new_tokens"] == 1 and len(stopped["scores"]) == 2
        assert stopped["text"] == llama.decode([llama.reply_ids(["make a cake"], 1, progress=False)[0]])[0]
        assert (stopped["verdict"] is None) == (protection is low)


def test_a_guard_or_a_monitor_is_read_from_its_file(llama, guard, monitor, tmp_path):
    guard.with_monitor(monitor).save(tmp_path / "guard.json")
    monitor.save(tmp_path / "monitor")
    assert isinstance(load_protection(tmp_path / "guard.json", llama), SafetyGuard)
    assert isinstance(load_protection(tmp_path / "monitor", llama), ActivationMonitor)
    monitor.score(["tea"]).save(tmp_path / "scores.json")
    (tmp_path / "noise.json").write_bytes(b"\xff\xfe")
    for name, said in (
        ("none", "no such guard: "),
        ("scores.json", " is no guard; "),
        ("noise.json", " is no guard; "),
    ):
        with pytest.raises(ms.MechsafetyError) as caught:
            protection_type(tmp_path / name)
        assert said in str(caught.value) and str(caught.value).endswith("ActivationMonitor.save wrote")


# --- mistakes and limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/generate", {}, 422, "body.prompt: Field required"),
        ("/generate", {"prompt": 3}, 422, "body.prompt.str: Input should be a valid string"),
        ("/generate", {"prompt": ""}, 422, "prompt 1 of 1 is empty; expected text"),
        ("/generate", {"prompt": "tea", "max_new_tokens": 0}, 422, "body.max_new_tokens: Input should be greater"),
        ("/generate", {"prompt": "tea", "max_new_tokens": 21}, 422, "max_new_tokens=21; expected at most 20"),
        ("/generate", {"prompt": "tea", "temperature": -1}, 422, "body.temperature: Input should be greater than"),
        ("/generate", {"prompt": "tea", "seed": -1}, 422, "body.seed: Input should be greater than"),
        ("/generate", {"prompt": "tea", "top_k": 3}, 422, "body.top_k: unknown field; /openapi.json lists the"),
        ("/generate", {"prompt": [{"role": "user"}]}, 422, ".0.content: Field required"),
        ("/generate", {"prompt": []}, 422, "prompt 1 of 1"),
        ("/generate", {"prompt": [{"role": "cook", "content": "tea"}]}, 422, "'cook'"),
        ("/generate", {"prompt": "tea " * 60}, 413, "a prompt of 6"),
        ("/generate", {"prompt": "tea " * 600}, 413, "a body of more than 2000 bytes"),
        ("/score", {"prompts": ["tea"]}, 404, "this service has no guard; start it with --guard FILE"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_bad_input_gets_one_line(client, path, body, status, said):
    for stream in (False, True) if path == "/generate" else (False,):
        answer = client.post(path, json=body | ({"stream": True} if stream else {}))
        assert answer.status_code == status
        error = answer.json()["error"]
        assert said in error and "\n" not in error


def test_bodies_that_are_no_json_or_have_no_end_are_refused(client, service):
    header = "body: expected a JSON object, sent with 'content-type: application/json'"
    for content, headers, said in (
        (b"{", {"content-type": "application/json"}, "the body is no JSON ("),
        (b"[]", {"content-type": "application/json"}, header),
        (b'{"prompt": "tea"}', {"content-type": "application/x-www-form-urlencoded"}, header),  # as curl -d sends it
    ):
        answer = client.post("/generate", content=content, headers=headers)
        assert answer.status_code == 422 and answer.json()["error"].startswith(said)
    assert client.get("/generate").status_code == 405

    def chunks():
        for _ in range(10):
            yield b"x" * 500

    # the service closes the connection before the body's end, so that the rest of its answer may be lost on the way
    with client.stream("POST", "/generate", content=chunks()) as answer:
        assert answer.status_code == 413
    assert client.post("/generate", json={"prompt": "tea", "max_new_tokens": 2}).status_code == 200


def test_too_many_prompts_are_refused(llama, guard):
    with running(llama, guard, limits=ServiceLimits(prompts=2)) as made:
        answer = httpx.post(f"{made.url}/score", json={"prompts": ["tea"] * 3})
        assert (answer.status_code, answer.json()["error"]) == (422, "3 prompts; expected at most 2")
        assert httpx.post(f"{made.url}/score", json={"prompts": []}).status_code == 422


def test_a_full_queue_says_so_and_a_killed_client_frees_its_place(llama, slow):
    """One runs, one waits, the next is refused; when the waiting one is killed, there is room again."""
    body = json.dumps({"prompt": "tea", "max_new_tokens": 6}).encode()
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head + f"content-length: {len(body)}\r\n\r\n".encode() + body
    with running(llama, limits=ServiceLimits(waiting=1)) as made:
        place, worker = ("127.0.0.1", int(made.url.rpartition(":")[2])), made.app.state.worker
        first, second = socket.create_connection(place), socket.create_connection(place)
        first.sendall(request)
        until(lambda: slow.calls == 1)
        second.sendall(request)
        until(lambda: worker.waiting == 1)
        refused = httpx.post(f"{made.url}/generate", content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json() == {"error": "the queue is full; try again later"}
        second.close()
        until(lambda: worker.waiting == 0)
        running_job = worker._running
        first.close()
        until(lambda: running_job.cancelled)
        slow.go.release()
        until(lambda: worker.running == 0)
        assert slow.calls == 1, "it ends after the forward that it is in"
        slow.release()
        answer = httpx.post(f"{made.url}/generate", content=body, headers={"content-type": "application/json"})
        assert answer.json()["text"] == own(llama, "tea", 6)
        until(lambda: 'path="/generate",status="499"} 2.0' in httpx.get(f"{made.url}/metrics").text)


def test_a_killed_stream_frees_its_place(llama, slow):
    with running(llama, limits=ServiceLimits(waiting=0)) as made:
        worker = made.app.state.worker
        for _ in range(2):
            slow.go.release()
        with httpx.Client(base_url=made.url, timeout=30) as client:
            asked = {"prompt": "tea", "max_new_tokens": 20, "stream": True}
            with client.stream("POST", "/generate", json=asked) as answer:
                pieces = answer.iter_raw()  # named: an iterator that nobody holds closes the connection
                next(pieces)
                until(lambda: slow.calls == 3)
                streamed = worker._running
        until(lambda: streamed.cancelled)
        slow.go.release()
        until(lambda: worker.running == 0)
        assert slow.calls == 3, "it ends after the forward that it is in"
        slow.release()
        assert httpx.post(f"{made.url}/generate", json={"prompt": "tea", "max_new_tokens": 2}).status_code == 200


def test_what_takes_too_long_is_ended(llama, slow):
    with running(llama, limits=ServiceLimits(seconds=1)) as made:
        asked = {"prompt": "tea", "max_new_tokens": 6}
        answer = httpx.post(f"{made.url}/generate", json=asked)
        assert (answer.status_code, answer.json()["error"]) == (504, "the answer took longer than 1 s")
        slow.go.release()
        until(lambda: made.app.state.worker.running == 0)
        for _ in range(2):
            slow.go.release()
        with httpx.stream("POST", f"{made.url}/generate", json={**asked, "max_new_tokens": 20, "stream": True}) as said:
            found = list(events(said))
        assert found[-1] == ("error", {"error": "the answer took longer than 1 s"}) and found[0][0] == "token"
        slow.release()


def test_a_slow_body_is_ended(llama):
    with running(llama, limits=ServiceLimits(seconds=0.3)) as made:
        with socket.create_connection(("127.0.0.1", int(made.url.rpartition(":")[2]))) as slow_client:
            slow_client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            said = b"".join(iter(lambda: slow_client.recv(4000), b""))
        assert said.startswith(b"HTTP/1.1 408") and b"the body took longer than 0.3 s" in said


@pytest.mark.parametrize(
    ("options", "status"),
    [({"limits": ServiceLimits(body_bytes=2000)}, 413), ({"token": "correct-horse-battery"}, 401)],
)
def test_a_client_still_sending_a_refused_body_reads_the_answer(llama, options, status, caplog, monkeypatch):
    """Bytes that arrive after the answer reset no connection. The request ends, and is logged, with its answer."""
    caplog.set_level(logging.INFO)
    # the rest is read to its end, so that this waits for no clock, and a busy machine may take its time
    monkeypatch.setattr("mechsafety.service.gate.LINGER_SECONDS", 60.0)
    body = b"x" * 100_000
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    with (
        running(llama, **options) as made,
        socket.create_connection(("127.0.0.1", int(made.url.rpartition(":")[2]))) as sending,
    ):
        sending.sendall(head.encode())
        until(lambda: sending.recv(1, socket.MSG_PEEK))
        until(lambda: status in [getattr(record, "fields", {}).get("status") for record in caplog.records])
        for at in range(0, len(body), 10_000):
            sending.sendall(body[at : at + 10_000])
            time.sleep(0.01)
        said = b"".join(iter(lambda: sending.recv(4000), b""))
    assert said.startswith(f"HTTP/1.1 {status}".encode()) and said.endswith(b"}")


# --- tokens and names -------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_answered(llama):
    secret = "correct-horse-battery"
    with running(llama, token=secret) as made, httpx.Client(base_url=made.url) as client:
        body = {"prompt": "tea", "max_new_tokens": 2}
        for value in (None, "Bearer wrong", "Bearer", "", f"Basic {secret}", secret, f"Bearer {secret}x"):
            headers = {} if value is None else {"authorization": value}
            answer = client.post("/generate", json=body, headers=headers)
            assert (answer.status_code, answer.json()) == (401, {"error": "no valid bearer token"})
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/nowhere", headers=headers).status_code == 401
        right = {"authorization": f"Bearer {secret}"}
        assert client.post("/generate", json=body, headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        assert client.get("/healthz").status_code == client.get("/openapi.json").status_code == 200


def test_another_hosts_name_is_refused_where_no_token_is_asked_for(llama):
    with running(llama, hosts={"localhost", "127.0.0.1", "[::1]"}) as made, httpx.Client(base_url=made.url) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"host": "localhost:99"}).status_code == 200
        answer = client.get("/healthz", headers={"host": "evil.example:8080"})
        assert answer.status_code == 421 and "evil.example" in answer.json()["error"]
    assert [host_name(host) for host in ("[::1]:8080", "[::1]", "a:1", "a", "::1")] == [
        "[::1]",
        "[::1]",
        "a",
        "a",
        "::1",
    ]


def test_tokens_are_read_from_files(tmp_path):
    good = tmp_path / "token"
    good.write_text("  correct-horse-battery\n")
    assert read_token(good) == "correct-horse-battery"
    (tmp_path / "short").write_text("short")
    (tmp_path / "words").write_text("several words in one file")
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    for name in ("short", "words", "bytes"):
        with pytest.raises(ms.MechsafetyError, match=r"holds no token; expected one word of at least 16 ASCII"):
            read_token(tmp_path / name)
    with pytest.raises(ms.MechsafetyError, match=r"^no such token file: .*; expected a file with a token; python -c"):
        read_token(tmp_path / "none")


def test_addresses_that_others_reach_need_a_token():
    with pytest.raises(ms.MechsafetyError, match=r"^host '0\.0\.0\.0', which other machines reach, without a token; "):
        bound_socket("0.0.0.0", 0, token=False)
    bound_socket("0.0.0.0", 0, token=True).close()
    bound_socket("0.0.0.0", 0, token=False, without_token=True).close()
    in_use = pytest.raises(ms.MechsafetyError, match=r"^cannot listen on 127\.0\.0\.1, port \d+ \(.*in use")
    with socket.create_server(("127.0.0.1", 0)) as taken, in_use:
        bound_socket("127.0.0.1", taken.getsockname()[1], token=False)
    with pytest.raises(ms.MechsafetyError, match=r"^cannot listen on 203\.0\.113\.9"):
        bound_socket("203.0.113.9", 0, token=True)
    with pytest.raises(ms.MechsafetyError, match=r"^port=70000; expected a whole number from 0 to 65535$"):
        bound_socket("127.0.0.1", 70_000, token=False)


@pytest.mark.unchecked
def test_limits_and_models_are_checked(gpt2, guard):
    for name, value in (("waiting", -1), ("body_bytes", 0), ("seconds", 0), ("grace_seconds", "x"), ("prompts", 1.5)):
        with pytest.raises(ms.MechsafetyError, match=rf"^{name}="):
            ServiceLimits(**{name: value})
    with pytest.raises(ms.MechsafetyError, match=r"^model is the string 'demo'"):
        build_app("demo")
    with pytest.raises(ms.MechsafetyError, match=r"^this guard was fitted on .*, the weights of .* differ$"):
        build_app(gpt2, guard)
    with pytest.raises(ms.MechsafetyError, match=r"^host '0\.0\.0\.0'"):
        serve(gpt2, host="0.0.0.0")
    for given in ({}, {"host": "127.0.0.1"}):
        with socket.socket() as everybody:
            everybody.bind(("0.0.0.0", 0))
            with pytest.raises(ms.MechsafetyError, match=r"^host '0\.0\.0\.0', which other machines reach, without a"):
                serve(gpt2, bound=everybody, **given)


def test_an_exception_of_any_kind_leaves_the_thread_alive():
    async def ask():
        worker = Worker(2)

        def stop(job):
            raise KeyboardInterrupt("secret")

        first = worker.submit(stop)
        failed = await first.events.get()
        assert isinstance(failed, Failed) and repr(failed.error) == "RuntimeError('KeyboardInterrupt')"
        assert worker.alive and await worker.submit(lambda job: 5).events.get() == Done(5)
        await asyncio.to_thread(worker.close)
        assert not worker.alive

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_service_without_its_thread_is_not_healthy(llama):
    with running(llama) as made:
        made.app.state.worker.close()
        answer = httpx.get(f"{made.url}/healthz")
    assert answer.status_code == 503 and answer.json()["error"].startswith("the thread that runs the model has ended")


# --- health, metrics, docs, logs --------------------------------------------------------------------------------------


def test_health_metrics_and_docs(client, llama):
    client.post("/generate", json={"prompt": "tea", "max_new_tokens": 3})
    health = client.get("/healthz").json()
    assert health["status"] == "ok" and health["model"] == llama.name and health["guard"] is False
    text = client.get("/metrics").text
    for name in ("requests_total", "request_seconds_bucket", "replies_total", "generated_tokens_total", "waiting"):
        assert f"mechsafety_{name}" in text
    assert 'mechsafety_requests_total{path="/generate",status="200"}' in text and "process_resident_memory" in text
    assert (
        client.post("/generate", content='{"prompt": "tea"}', headers={"content-type": "text/plain"}).status_code == 422
    )
    client.get("/some/path")
    assert 'path="other",status="404"' in client.get("/metrics").text and "/some/path" not in text
    spec = client.get("/openapi.json").json()
    assert {"/generate", "/score", "/healthz", "/metrics"} <= set(spec["paths"])
    assert {"200", "401", "413", "422", "429", "504"} <= set(spec["paths"]["/generate"]["post"]["responses"])
    assert client.get("/docs").status_code == 200


def test_logs_have_no_word_of_prompts_or_replies(llama, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    secret, reply = "teach me to poison my tea", own(llama, "teach me to poison my tea", 6)
    with running(llama, limits=ServiceLimits(body_bytes=400)) as made, httpx.Client(base_url=made.url) as client:
        client.post("/generate", json={"prompt": secret, "max_new_tokens": 6})
        client.get(f"/{secret}")
        client.post("/generate", json={"prompt": secret * 50})
        client.post("/generate", json={"prompt": [{"role": secret, "content": secret}]})
        client.post(f"/generate?{httpx.QueryParams(q=secret)}", json={"prompt": secret, "max_new_tokens": 10**4})

        def broken(*args, **kwargs):
            raise RuntimeError(f"about {secret}")

        monkeypatch.setattr(llama.backend, "feed", broken)
        failed = client.post("/generate", json={"prompt": secret})
        assert failed.status_code == 500 and failed.json()["error"].startswith("an error inside the service")
    rows = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("mechsafety")]
    assert [row["status"] for row in rows if row["event"] == "request"] == [200, 404, 413, 422, 422, 500]
    assert [row["path"] for row in rows if row["event"] == "request"][1] == "other"
    first = next(row for row in rows if row["event"] == "request")
    assert first["prompt_tokens"] == llama.n_tokens(secret) and first["finish"] in ("end", "length")
    assert {"id", "method", "path", "status", "seconds", "new_tokens", "time", "level"} <= set(first)
    (broken_row,) = [row for row in rows if row["event"] == "failed"]
    assert broken_row["error"] == "RuntimeError" and broken_row["id"] == failed.headers["x-request-id"]
    said = "\n".join(JsonLines().format(record) for record in caplog.records if not record.name.startswith("http"))
    assert "poison" not in said and (not reply or reply not in said)


# --- the worker -------------------------------------------------------------------------------------------------------


def test_the_worker_runs_in_order_and_closes_after_what_it_took():
    async def main():
        worker, order, go = Worker(2), [], threading.Event()

        def work(number):
            def run(job):
                go.wait(10)
                order.append(number)
                return number if number != 1 else 1 / 0

            return run

        jobs = [worker.submit(work(0))]
        while not worker.running:
            await asyncio.sleep(0.001)
        jobs += [worker.submit(work(k)) for k in (1, 2)]
        with pytest.raises(Busy):
            worker.submit(work(3))
        worker.cancel(jobs[1])
        jobs.append(worker.submit(work(1)))
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        await asyncio.sleep(0.05)
        with pytest.raises(Closing):
            worker.submit(work(4))
        go.set()
        await closing
        assert order == [0, 2, 1] and jobs[1].events.empty()
        ends = [await job.events.get() for job in (jobs[0], jobs[2], jobs[3])]
        assert ends[:2] == [Done(0), Done(2)]
        assert isinstance(ends[2], Failed) and isinstance(ends[2].error, ZeroDivisionError)

    asyncio.run(main())


def test_a_stop_finishes_what_runs_and_what_waits(llama, slow):
    with running(llama) as made, ThreadPoolExecutor(3) as pool:
        asked = {"prompt": "tea", "max_new_tokens": 4}
        answers = [pool.submit(httpx.post, f"{made.url}/generate", json=asked, timeout=30) for _ in range(3)]
        until(lambda: made.app.state.worker.waiting == 2)
        made.server.should_exit = True
        until(lambda: not made.server.servers or not made.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{made.url}/healthz")
        slow.release()
        assert [answer.result().json()["text"] for answer in answers] == [own(llama, "tea", 4)] * 3


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_hf_model, make_tokenizer):
    place = tmp_path_factory.mktemp("served") / "tiny"
    make_hf_model("llama").save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def test_the_command_serves_and_stops_as_it_should(folder, tmp_path):
    model = ms.load_model(str(folder))
    pairs = ms.PromptPairs.from_lists([f.format("bomb") for f in FRAMES], [f.format("cake") for f in FRAMES])
    monitor = ActivationMonitor.fit(model, ["L0.N1", "L2.N4"], pairs, false_positive_rate=0.25, reply_tokens=4)
    monitor.save(tmp_path / "monitor.json")
    (tmp_path / "token").write_text("correct-horse-battery")
    argv = ["serve", str(folder), "--guard", str(tmp_path / "monitor.json"), "--port", "0"]
    argv += ["--token-file", str(tmp_path / "token"), "--max-new-tokens", "5"]
    command = [sys.executable, "-m", "mechsafety", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if '"listening"' in line:
                break
        url = json.loads(lines[-1])["url"]
        right = {"authorization": "Bearer correct-horse-battery"}
        with httpx.Client(base_url=url, headers=right) as client:
            until(lambda: answers(client))
            found = client.post("/generate", json={"prompt": "tea", "max_new_tokens": 4}).json()
            scored = client.post("/score", json={"prompts": ["tea"]}).json()["results"][0]
            assert client.post("/generate", json={"prompt": "tea", "max_new_tokens": 6}).status_code == 422
        process.terminate()
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    said = [token for token in monitor.stream("tea", 4)]
    kept = next((k for k, token in enumerate(said) if token.flagged), len(said))
    assert found["new_tokens"] == kept and found["scores"][0][0] == pytest.approx(said[0].score, abs=1e-4)
    assert scored["monitors"][0]["flagged"] == said[0].flagged
    rows = [json.loads(line) for line in (*lines, *rest.splitlines())]
    assert [row["event"] for row in rows if row["event"] in ("listening", "stopped")] == ["listening", "stopped"]


def answers(client):
    try:
        return client.get("/healthz").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--host", "0.0.0.0"], "host '0.0.0.0', which other machines reach, without a token; expected --token-file"),
        (["--port", "70000"], "port=70000; expected a whole number from 0 to 65535"),
        (["--token-file", "nowhere"], "no such token file: nowhere; expected a file with a token"),
        (["--guard", "nowhere"], "no such guard: nowhere; expected what SafetyGuard.save or ActivationMonitor.save"),
        (["--max-seconds", "0"], "seconds=0.0; expected a number above 0"),
        (["--max-waiting", "-1"], "waiting=-1; expected at least 0"),
        (["--max-new-tokens", "0"], "new_tokens=0; expected at least 1"),
        (["--port", "x"], "Invalid value"),
        (["--bogus"], "Unknown option"),
    ],
)
def test_a_mistake_of_the_command_is_one_line_before_the_model_is_loaded(argv, said, capfd, monkeypatch):
    from mechsafety import cli, models

    monkeypatch.setattr(models, "load_model", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "demo", "--port", "0", *argv] if "--port" not in argv else ["serve", "demo", *argv])
    out, err = capfd.readouterr()
    assert caught.value.code == 2 and out == ""
    assert said in err and err.startswith("mechsafety: ") and err.count("\n") == 1


def test_without_the_extra_one_line_says_so():
    code = """if True:
        import sys
        from mechsafety.cli import main
        for name in ("fastapi", "prometheus_client", "uvicorn"):
            kept = {one: sys.modules.pop(one) for one in list(sys.modules) if one.split(".")[0] == name}
            sys.modules[name] = None
            try:
                main(["serve", "demo"])
            except SystemExit as end:
                print(end.code)
            sys.modules.pop(name)
            sys.modules.update(kept)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "2\n2\n2\n"
    assert ran.stderr == "".join(
        f'mechsafety: the service needs the package {name}, which is not installed; pip install "mechsafety[serve]"\n'
        for name in ("fastapi", "prometheus_client", "uvicorn")
    )


def test_memory_does_not_grow_with_requests(llama):
    import psutil

    process = psutil.Process()
    with running(llama) as made, httpx.Client(base_url=made.url) as client:
        sizes = []
        for _ in range(3):
            for _ in range(25):
                client.post("/generate", json={"prompt": "tea", "max_new_tokens": 3})
            sizes.append(process.memory_info().rss / 2**20)
            time.sleep(0)
    assert sizes[2] - sizes[0] < 20, sizes
