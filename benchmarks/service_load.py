"""A service under load: is an answer lost or mixed up, is memory steady, do killed clients free their place?

    python benchmarks/service_load.py [--requests N] [--clients N] [--tokens N] [--out FOLDER]

A tiny random model is served by ``mechsafety serve`` in a process of its own, on loopback. Every answer is compared
with the reply of `LensModel.generate` to its prompt alone. It writes its part of benchmarks/service.json, and
SERVICE.md from that. The exit status is not zero if an answer is lost or differs, a place stays held, the memory grows
by more than 32 MiB, or the service does not stop as it should.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from service_report import HERE, store
from tiny import tiny_hf_model, tiny_tokenizer

import mechsafety as ms

MEMORY_LIMIT = 32.0
WORDS = ["bomb", "cake", "car", "tea", "house", "bread"]
FRAMES = ["make a {}", "please make a {}", "how do i make a {}", "teach me to make a {}", "write about a {}"]
FRAMES += ["explain a {} please", "why is my {} blue", "can i help a {}", "what is a {}", "the {} of my {other}"]


@dataclass(frozen=True)
class Served:
    """A running service."""

    url: str
    process: psutil.Process

    @property
    def rss_mib(self) -> float:
        """Memory that the process holds."""
        return self.process.memory_info().rss / 2**20

    def health(self) -> dict[str, Any]:
        """What /healthz says."""
        found: dict[str, Any] = httpx.get(f"{self.url}/healthz", timeout=30).json()
        return found

    def idle(self, seconds: float = 60.0) -> dict[str, Any]:
        """Health once nothing runs or waits, or after so long."""
        end = time.monotonic() + seconds
        while (found := self.health())["running"] + found["waiting"] and time.monotonic() < end:
            time.sleep(0.05)
        return found


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[Served, subprocess.Popen[str]]]:
    """The service in a process of its own; its log goes to a file."""
    command = [sys.executable, "-m", "mechsafety", "serve", str(folder), "--port", "0", *options]
    log = folder / "log.jsonl"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, text=True, cwd=Path(__file__).resolve().parents[1])
    try:
        while not (line := next((one for one in log.read_text().splitlines() if '"listening"' in one), "")):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.05)
        made = Served(json.loads(line)["url"], psutil.Process(process.pid))
        while True:
            try:
                made.health()
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield made, process
    finally:
        process.terminate()
        process.wait(60)


def prompts() -> list[str]:
    """Distinct prompts of different lengths."""
    return sorted({f.format(word, other=other) for f in FRAMES for word in WORDS for other in WORDS})


class Asker:
    """Asks for replies through one pool of connections, and compares them."""

    def __init__(self, url: str, expected: dict[str, str], tokens: int) -> None:
        self.expected, self.tokens = expected, tokens
        self.asked = sorted(expected)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.client = httpx.Client(base_url=url, timeout=300, limits=limits)

    def __call__(self, number: int) -> tuple[int, bool, float]:
        """Status of a request (0 if there is no whole answer), whether the answer is as expected, and its seconds."""
        prompt = self.asked[number * 7919 % len(self.asked)]
        body = {"prompt": prompt, "max_new_tokens": self.tokens, "stream": number % 2 == 1}
        start = time.perf_counter()
        try:
            with self.client.stream("POST", "/generate", json=body) as answer:
                text = answer.read().decode()
        except httpx.HTTPError:
            return 0, False, time.perf_counter() - start
        seconds = time.perf_counter() - start
        if answer.status_code != 200:
            return answer.status_code, False, seconds
        if not body["stream"]:
            return 200, json.loads(text)["text"] == self.expected[prompt], seconds
        events = [part.split("\ndata: ") for part in text.split("\n\n") if part]
        pieces = "".join(json.loads(data)["text"] for name, data in events if name == "event: token")
        whole = [json.loads(data)["text"] for name, data in events if name == "event: end"]
        if not whole:  # the stream broke off, or ended with an error
            return 0, False, seconds
        return 200, whole == [self.expected[prompt]] == [pieces], seconds


def under_load(served: Served, ask: Asker, requests: int, clients: int) -> dict[str, Any]:
    """Many requests by parallel clients."""
    for number in range(100):  # allocators and connections reach their size first
        ask(number)
    memory, found = [served.rss_mib], []
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for quarter in range(4):
            some = range(quarter * requests // 4, (quarter + 1) * requests // 4)
            found += list(pool.map(ask, some))
            memory.append(served.rss_mib)
    seconds = sorted(one for _, _, one in found)
    return {
        "requests": requests,
        "clients": clients,
        "lost": sum(status != 200 for status, _, _ in found),
        "different": sum(status == 200 and not same for status, same, _ in found),
        "per_second": requests / (time.perf_counter() - start),
        "seconds": [statistics.median(seconds), seconds[int(0.95 * len(seconds))], seconds[-1]],
        "rss_mib": memory,
    }


def killed(served: Served, ask: Asker, n: int) -> dict[str, Any]:
    """Clients that vanish: before their request is whole, while they wait, and while they read."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    rng = random.Random(0)

    def die(number: int) -> None:
        asked = {"prompt": ask.asked[number % len(ask.asked)], "max_new_tokens": 64, "stream": True}
        body = json.dumps(asked, allow_nan=False)
        head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
        with socket.create_connection((host, int(port))) as client:
            cut = number % 3
            client.sendall(request[: len(request) // 2] if cut == 0 else request)
            if cut == 2:
                client.recv(200)
            time.sleep(rng.random() * 0.2)
            # a reset, as of a process that is killed
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(die, range(n)))
    health = served.idle()
    after = [ask(number) for number in range(50)]
    return {
        "killed": n,
        "running": health["running"],
        "waiting": health["waiting"],
        "different": sum(not same for _, same, _ in after),
        "rss_mib": served.rss_mib,
    }


def overloaded(ask: Asker, requests: int, clients: int, waiting: int) -> dict[str, Any]:
    """More clients than places: some are refused at once, and the others get their answers."""
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(requests)))
    statuses = [status for status, _, _ in found]
    answered, refused = statuses.count(200), statuses.count(429)
    return {
        "waiting": waiting,
        "answered": answered,
        "refused": refused,
        "others": len(statuses) - answered - refused,
        "different": sum(status == 200 and not same for status, same, _ in found),
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    load, kill, full = found["load"], found["killed"], found["overload"]
    growth = load["rss_mib"][-1] - load["rss_mib"][0]
    checks: Sequence[tuple[str, bool]] = (
        ("answers lost", load["lost"] > 0),
        ("answers differ", load["different"] + kill["different"] + full["different"] > 0),
        (f"memory grew by {growth:.0f} MiB", growth > MEMORY_LIMIT),
        ("places stay held by killed clients", kill["running"] + kill["waiting"] > 0),
        ("nothing was refused", full["refused"] == 0),
        ("other statuses than 200 and 429", full["others"] > 0),
        (f"exit code {found['exit_code']}", found["exit_code"] != 0),
    )
    return [said for said, wrong in checks if wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--killed", type=int, default=200)
    parser.add_argument("--note", default="", help="what a reader should know of this run, such as a busy machine")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        tiny_hf_model("llama").save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        model = ms.load_model(str(folder))
        expected = {prompt: model.generate([prompt], args.tokens, progress=False)[0] for prompt in prompts()}
        found: dict[str, Any] = {"model": "A random Llama of 3 layers", "tokens": args.tokens, "note": args.note}
        found["replies"] = len(set(expected.values()))
        # a time limit that no slow machine reaches: what is lost is then lost for another reason
        patient = ("--max-seconds", "3600")
        with served(folder, *patient) as (made, process):
            ask = Asker(made.url, expected, args.tokens)
            found["load"] = under_load(made, ask, args.requests, args.clients)
            found["killed"] = killed(made, ask, args.killed)
        found["exit_code"] = process.returncode
        with served(folder, *patient, "--max-waiting", "4") as (made, process):
            ask = Asker(made.url, expected, args.tokens)
            found["overload"] = overloaded(ask, max(1, args.requests // 10), args.clients, 4)
        found["exit_code"] = found["exit_code"] or process.returncode
    store("service", found, args.out)
    wrong = faults(found)
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
