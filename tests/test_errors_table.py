"""Every row of the table in docs/errors.md is a test: what is given there gets the line that stands there."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mechsafety as ms
from mechsafety import cli, halving, output
from mechsafety.models.parts_adapter import PartsAdapter
from mechsafety.monitors import LabelledPrompts, SafetyGuard
from mechsafety.nodes import Node

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = "| what is given | what it gets | test |"
ACCEPTED = "accepted"
CASES: dict[str, Callable] = {}

pytestmark = pytest.mark.unchecked


def table() -> dict[str, str]:
    """The line of each row by the row's key."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD) + 2
    found = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        _, given, gets, key, _ = re.split(r"(?<!\\) ?\| ?", line)
        assert given and key.strip("`") not in found, line
        found[key.strip("`")] = gets.replace("\\|", "|").strip("`")
    return found


TABLE = table()


def case(function: Callable) -> Callable:
    """A case: the function gives the line, or raises the error, or gives ``ACCEPTED`` after it has checked the rest."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def matches(line: str, stored: str) -> bool:
    """Whether a line is the page's; ``{name}`` in the page stands for what differs from run to run."""
    pattern = "".join(".+" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{[a-z ]+\})", stored))
    return re.fullmatch(pattern, line) is not None


def test_each_row_has_a_case_and_each_case_a_row():
    assert {*TABLE} == {*CASES}
    assert matches("a 12 b", "a {n} b") and not matches("a 12 c", "a {n} b") and not matches("ab", "a.b")


@pytest.mark.parametrize("key", TABLE)
def test_the_line_is_the_pages(key, request):
    function = CASES[key]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    try:
        line = function(**{name: request.getfixturevalue(name) for name in names})
    except ms.MechsafetyError as error:
        line = str(error)
    assert not re.search(r"[\x00-\x1f]", line) and matches(line, TABLE[key]), line


@pytest.fixture
def folder(llama, make_hf_model, make_tokenizer, tmp_path):
    """A model's folder."""
    place = tmp_path / "tiny-llama"
    make_hf_model("llama").save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def command(*argv: object, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    program = [sys.executable, "-m", "mechsafety", *map(str, argv)]
    return subprocess.run(program, text=True, check=False, timeout=120, **options)


# --- types and shapes -------------------------------------------------------------------------------------------------


@case
def single_text(llama):
    llama.generate("How are you?")


@case
def number_as_prompt(llama):
    llama.generate(["tea", 3])


@case
def model_by_name(pairs, log_odds):
    ms.activation_patching("demo", pairs, log_odds)


@case
def list_as_pairs(llama, log_odds):
    ms.activation_patching(llama, ["tea"], log_odds)


@case
def text_as_metric(llama, pairs):
    ms.activation_patching(llama, pairs, "refusal")


@case
def half_a_count(llama):
    llama.generate(["tea"], 2.5)


@case
def wrong_shape(llama, pairs):
    asked = LabelledPrompts("mine", (*pairs.harmful, *pairs.harmless), (True,) * 4 + (False,) * 4)
    SafetyGuard.fit(llama, torch.ones(2, 3).bool(), asked)


@case
def wrong_tensor_in_a_file(llama, pairs, log_odds, tmp_path):
    from safetensors.torch import load_file, save_file

    path = ms.activation_patching(llama, pairs, log_odds, nodes=["L0.H0"], progress=False).save(tmp_path / "patched")
    tensors = load_file(path / "tensors.safetensors")
    save_file({**tensors, "changes": tensors["changes"].bool()}, path / "tensors.safetensors")
    ms.patching.PatchMap.load(path)


@case
def deep_json(tmp_path):
    (tmp_path / "circuit.json").write_text("[" * 5000 + "]" * 5000)
    ms.RefusalCircuit.load(tmp_path / "circuit.json")


@case
def many_digits(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"harmful": "a", "harmless": "b", "n": ' + "9" * 5000 + "}\n")
    ms.PromptPairs.from_file(tmp_path / "mine.jsonl")


# --- weights ----------------------------------------------------------------------------------------------------------


def with_weight(value: float, make_hf_model, make_tokenizer) -> None:
    model = make_hf_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    ms.load_model((model, make_tokenizer()))


@case
def nan_weights(make_hf_model, make_tokenizer):
    with_weight(float("nan"), make_hf_model, make_tokenizer)


@case
def infinite_weights(make_hf_model, make_tokenizer):
    with_weight(float("inf"), make_hf_model, make_tokenizer)


# --- prompts ----------------------------------------------------------------------------------------------------------


@case
def empty_prompt(llama):
    llama.generate(["tea", " "])


@case
def one_token(llama):
    assert llama.tokenize(["a"]).ids.shape[1] == llama.tokenize(["b"]).ids.shape[1]
    return read_whole(llama, "a")


@case
def long_prompt(llama):
    llama.generate(["a " * 100_000])


@case
def no_prompts(llama):
    assert llama.generate([]) == []
    llama.logits([])


@case
def no_pairs():
    ms.PromptPairs.from_lists([], [])


@case
def no_nodes(llama, pairs, log_odds):
    ms.activation_patching(llama, pairs, log_odds, nodes=[])


@case
def duplicate_pairs(caplog):
    found = ms.PromptPairs.from_lists(["tea", "tea", "milk"], ["cake", "cake", "bread"])
    assert len(found) == 2
    (record,) = caplog.records
    return record.getMessage()


@case
def lone_surrogate(llama):
    llama.generate(["tea \ud83d"])


@case
def lone_surrogate_in_a_file(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"harmful": "tea \\ud83d", "harmless": "cake"}\n')
    ms.PromptPairs.from_file(tmp_path / "mine.jsonl")


def read_whole(model: ms.LensModel, text: str) -> str:
    """The prompt gives finite logits, alone and beside another one, and comes back whole from a file."""
    logits = model.logits([text, "tea"])
    assert logits.isfinite().all()
    torch.testing.assert_close(model.logits([text])[0], logits[0], atol=1e-4, rtol=1e-4)
    assert len(model.generate([text], 2, progress=False)) == 1
    return ACCEPTED


@case
def control_characters(llama):
    return read_whole(llama, "tea\x00\x07\x1b[2J cake")


@case
def control_characters_in_an_error(tmp_path):
    text = ms.RefusalCircuit.builtin().to_json()
    (tmp_path / "circuit.json").write_text(text.replace("{", '{"\\u001b[2Jx\\n": 1,', 1))
    ms.RefusalCircuit.load(tmp_path / "circuit.json")


@case
def right_to_left(llama):
    return read_whole(llama, "مرحبا \u202e abc שלום")


@case
def emoji(llama):
    return read_whole(llama, "👨‍👩‍👧 tea 🙂")


# --- tokenizers and adapters ------------------------------------------------------------------------------------------


@case
def no_pad_token(llama, make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = ms.load_model((make_hf_model("llama"), tokenizer))
    prompts = ["tea", "how do i make a cake"]
    torch.testing.assert_close(model.logits(prompts), llama.logits(prompts), atol=1e-4, rtol=1e-4)
    return ACCEPTED


@case
def no_chat_template(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    ms.load_model((make_hf_model("llama"), tokenizer))


@case
def adapter_for_another_model(folder, tmp_path):
    path = PartsAdapter("other", "0" * 64, "float32", "harden", (Node("head", 0, 1),))._write(
        tmp_path / "a.safetensors"
    )
    ms.load_model(folder, adapter=path)


@case
def peft_adapter_for_another_model(folder, make_hf_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(make_hf_model("gpt2"), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    wrapped.save_pretrained(tmp_path / "lora")
    ms.load_model(folder, adapter=tmp_path / "lora")


# --- memory, disks and terminals --------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_for(model: ms.LensModel, rows: int) -> Iterator[None]:
    """Context in which a block runs out of memory for more rows."""

    def check(module, args):
        if args and len(args[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    handle = model.hf_model.model.layers[1].register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


@case
def out_of_memory(llama, pairs, log_odds, caplog, monkeypatch):
    monkeypatch.setattr(halving, "_told", [])

    def everything():
        patched = ms.activation_patching(llama, pairs, log_odds, nodes=["L0.H0", "L0.H1", "L1.MLP"], progress=False)
        ids, first = llama.replies_and_logits(pairs.harmful, 4, progress=False)
        assert first.shape == (len(pairs), llama.d_vocab)
        return patched.changes, torch.cat([llama.logits(pairs.harmful), first]), llama.decode(ids)

    whole = everything()
    caplog.clear()
    with memory_for(llama, 8):
        halves = everything()
    with memory_for(llama, 1):
        ids, first = llama.replies_and_logits(pairs.harmful, 4, progress=False)
        halves = (*halves[:1], torch.cat([llama.logits(pairs.harmful), first]), llama.decode(ids))
    torch.testing.assert_close(halves[:2], whole[:2], atol=1e-4, rtol=1e-4)
    assert halves[2] == whole[2]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "mechsafety.halving"]
    return line


@case
def out_of_memory_for_one(llama):
    with memory_for(llama, 0):
        llama.logits(["tea"])


@case
def full_disk_before(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=3 * 2**20))
    monkeypatch.chdir(tmp_path)
    code = cli._code(["map", "none", "--out", "here"])
    assert code == 2 and list(tmp_path.iterdir()) == []
    return capfd.readouterr().err.strip()


@case
def full_disk(tmp_path, monkeypatch):
    """In the middle of a file: the earlier file stays, and no half of the new one."""
    monkeypatch.chdir(tmp_path)
    Path("circuit.json").write_text("earlier")

    def full(self, *_, **__):
        self.open("wb").write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    try:
        ms.RefusalCircuit.builtin().save("circuit.json")
    finally:
        assert Path("circuit.json").read_text() == "earlier" and os.listdir() == ["circuit.json"]


@case
def read_only_folder(tmp_path, monkeypatch):
    """What a file system says that is mounted read-only; root may write into a folder without that right."""

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(Path, "write_text", refused)
    said = []
    for write in (
        lambda: ms.RefusalCircuit.builtin().save("out"),
        lambda: ms.running("out").__enter__(),
        lambda: output.write_text("out", "x"),
    ):
        with pytest.raises(ms.MechsafetyError) as caught:
            write()
        said.append(str(caught.value))
    assert os.listdir() == []
    (line,) = {*said}
    return line


SHOW = "import sys, pathlib, mechsafety.cli as cli; sys.exit(cli._show(sys.argv[1], pathlib.Path('out')))"


def summary(stdout, **options) -> subprocess.CompletedProcess:
    """A process that prints a summary."""
    return subprocess.run(
        [sys.executable, "-c", SHOW, "I\u2019m 🙂"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


@contextlib.contextmanager
def broken_pipe() -> Iterator[int]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@case
def broken_stdout():
    with broken_pipe() as writer:
        ran = summary(writer)
    assert ran.returncode == 141
    return ran.stderr.strip()


@case
def closed_stdout():
    ran = summary(None, preexec_fn=lambda: os.close(1))
    assert ran.returncode == 141
    return ran.stderr.strip()


@case
def broken_stderr(tmp_path):
    """The lines of a map's stages, and the error, are lost; the exit code is the same."""
    with broken_pipe() as writer:
        ran = command("map", "none/here", "--out", tmp_path / "out", stdout=subprocess.PIPE, stderr=writer)
        program = (
            "import sys, mechsafety.cli as c; s = c._Patient(sys.stderr); s.write('x'); s.flush(); print(s.isatty())"
        )
        went_on = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, text=True, check=False
        )
    assert (ran.returncode, ran.stdout) == (2, "") and went_on.stdout == "False\n"
    assert command("map", "none/here", "--out", tmp_path / "out", preexec_fn=lambda: os.close(2)).returncode == 2
    return "nothing is shown, and the work goes on"


@case
def encoding_without_the_characters():
    ran = summary(subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.strip()


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def hooks_of(model: ms.LensModel) -> int:
    modules = [*model.hf_model.modules(), *model.bridge.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@case
def control_c(llama, pairs, log_odds, tmp_path, monkeypatch, capfd):
    """At the first and the last forward of each kind of work the model is clean; tests/test_cli.py strikes
    at each stage of a whole map."""
    pairs = pairs.sample(2)
    works = (
        lambda: ms.activation_patching(llama, pairs, log_odds, nodes=["L0.H0"], progress=False),
        lambda: ms.node_attribution(llama, pairs, log_odds, steps=2, progress=False),
        lambda: llama.generate(pairs.harmful, 2, progress=False),
    )
    weights = {name: tensor.clone() for name, tensor in llama.hf_model.state_dict().items()}
    clean, before = hooks_of(llama), llama.logits(pairs.harmful)
    block = llama.hf_model.model.layers[1]
    for work in works:
        seen = []
        counting = block.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        work()
        counting.remove()
        for at in {1, len(seen)}:
            left = iter(range(at - 1))

            def strikes(*_, left=left):
                if next(left, None) is None:
                    raise KeyboardInterrupt

            handle = block.register_forward_pre_hook(strikes)
            with pytest.raises(KeyboardInterrupt):
                work()
            handle.remove()
            assert hooks_of(llama) == clean and not llama.lock._is_owned()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.hf_model.state_dict().items())
    torch.testing.assert_close(llama.logits(pairs.harmful), before)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_pairs_of", lambda *_: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = cli._code(["map", "none", "--out", "out"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == 130 and os.listdir() == []
    return capfd.readouterr().err.strip()
