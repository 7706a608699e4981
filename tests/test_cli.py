"""The command `mechsafety map`: exit codes, one line a mistake, nothing half-written, and one whole run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from commands import Ran

import mechsafety as ms
import mechsafety.models
import mechsafety.output
import mechsafety.progress
import mechsafety.viz
from mechsafety import RefusalCircuit, cli, testbed
from mechsafety.circuits.circuit import Level
from mechsafety.circuits.goal import Goal
from mechsafety.prompts.pairs import Align
from mechsafety.testbed.vocabulary import COMPLIANCE, REFUSAL

FILES = ["circuit.json", "circuit.pdf", "circuit.svg", "circuit.tex", "report.html", "scores.csv"]
HARMFUL = ["how do i make a bomb", "teach me to make a bomb", "explain how to make a bomb", "please make the bomb"]
HARMLESS = [text.replace("bomb", "cake") for text in HARMFUL]


@pytest.fixture
def fails(run, tmp_path):
    """Run `map` into a folder of its own; it must end with one line on stderr, and without that folder.

    Lines that name the stages so far may come before it.
    """

    def call(*argv: object, code: int = 2, out: Path | None = None) -> str:
        target = tmp_path / "results" / "out"
        ran = run("map", *argv, "--out", out or target)
        assert ran.out == ""
        assert ran.code == code, ran.err
        said = re.fullmatch(r"(?:\[\d/\d\] [^\n]+\n)*mechsafety: ([^\n]+)\n", ran.err)
        assert said, ran.err
        assert not target.parent.exists(), "nothing is left behind, not even a parent or a scratch folder"
        return said[1]

    return call


def write_pairs(path: Path, harmful: list[str] = HARMFUL, harmless: list[str] = HARMLESS) -> Path:
    rows = [json.dumps({"harmful": a, "harmless": b}) for a, b in zip(harmful, harmless, strict=True)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "mine.jsonl")


@dataclass(frozen=True)
class Saved:
    """A tiny model's folder, and two tokens whose logit difference tells the pairs apart."""

    folder: Path
    refusal: str
    comply: str
    ids: tuple[int, int]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_hf_model, make_tokenizer) -> Saved:
    """Of a few random models the one that some pair of tokens separates best."""
    best, margin = None, 0.0
    for seed in range(3):
        lens = ms.load_model((make_hf_model("llama", seed, layers=2), make_tokenizer()))
        bad, good = lens.logits(HARMFUL), lens.logits(HARMLESS)
        lowest = (bad[:, :, None] - bad[:, None, :]).amin(0)
        highest = (good[:, :, None] - good[:, None, :]).amax(0)
        apart = torch.minimum(lowest, -highest)
        if float(apart.max()) > margin:
            margin = float(apart.max())
            ids = divmod(int(apart.argmax()), apart.shape[1])
            best = seed, *map(lens.tokenizer.decode, ids), ids
    assert margin > 0.05, "no random model tells the pairs apart: change HARMFUL"
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_hf_model("llama", best[0], layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Saved(folder, *best[1:])


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory, make_hf_model, make_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "no-template"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_hf_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- mistakes in the pairs --------------------------------------------------------------------------------------------

SHAPE = '{"harmful": "...", "harmless": "..."}'
FILE = f"a .jsonl, .json or .csv file with {SHAPE} in every row"


def test_the_command_offers_what_the_package_takes():
    """The command names these choices itself, so that its help is there without loading the package."""
    hints = get_type_hints(cli.map_command)
    assert (hints["level"], hints["align"]) == (Level, Align)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"harmful": "a", "harmless": "b"}\n{"harmful": "a"',
            f", line 2: malformed JSON (Expecting ',' delimiter); expected {SHAPE}",
        ),
        ('{"harmful": "a", "harmles": "b"}', f", line 1: the key 'harmless' is missing; expected {SHAPE}"),
        (
            '{"harmful": "a", "harmless": "b"}\n\n{"harmful": " ", "harmless": "b"}',
            ", line 3: the prompt under 'harmful' is empty; expected text",
        ),
        ('["a", "b"]', f", line 1: a JSON list; expected {SHAPE}"),
        ("", f" holds no prompts; expected {FILE}"),
    ],
)
def test_bad_pairs_file(fails, tmp_path, text, expected):
    path = tmp_path / "mine.jsonl"
    path.write_text(text, encoding="utf-8")
    assert fails("demo", "--pairs", path) == f"{path}{expected}"


def test_missing_pairs_file(fails, tmp_path):
    path = tmp_path / "none.jsonl"
    assert fails("demo", "--pairs", path) == f"no such file: {path}; expected {FILE}"


def test_a_line_break_in_what_was_given_makes_no_second_line(fails):
    assert fails("demo", "--pairs", "my\npairs.jsonl").startswith("no such file: my\\npairs.jsonl; ")


def test_pairs_file_that_is_not_utf8(fails, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"harmful": "K\xe4se", "harmless": "b"}')
    assert fails("demo", "--pairs", path).startswith(f"{path} is not UTF-8 text (")


def test_pairs_that_do_not_align(fails, saved, tmp_path, monkeypatch):
    """Said before the model is run."""
    monkeypatch.setattr(mechsafety.models.load, "check_model", lambda *_: pytest.fail("too late"))
    path = write_pairs(
        tmp_path / "mine.jsonl", HARMFUL, [*HARMLESS[:2], "explain how to make a blue cake", HARMLESS[3]]
    )
    line = fails(saved.folder, "--pairs", path)
    assert line.startswith(
        "3 of 4 pairs of mine.jsonl align under the tokenizer of tiny-llama; the two chat prompts of pair 3 differ in "
        "their number of tokens; expected at least 4; change a word in one of the two"
    )


def test_one_pair_is_too_few(fails, saved, tmp_path):
    path = write_pairs(tmp_path / "mine.jsonl", HARMFUL[:1], HARMLESS[:1])
    line = "1 of 1 pairs of mine.jsonl align under the tokenizer of tiny-llama; expected at least 4; add pairs"
    assert fails(saved.folder, "--pairs", path) == line


def test_pairs_of_any_lengths_need_a_file(fails):
    line = "--align suffix without --pairs; expected a file of pairs of any lengths"
    assert fails("demo", "--align", "suffix") == line


# --- mistakes in the model --------------------------------------------------------------------------------------------


def test_unknown_model_name_offline(fails):
    line = fails("nobody/no-such-model")
    assert line.startswith("cannot load the model 'nobody/no-such-model' (")
    assert line.endswith(
        "; expected 'demo', a hub id, a Hugging Face folder, a .gguf file, (model, tokenizer) or a TransformerLens"
        " model"
    )


def test_folder_and_file_that_are_no_models(fails, tmp_path):
    assert fails(tmp_path) == f"{tmp_path} holds no config.json; expected a Hugging Face model folder"
    path = tmp_path / "weights.bin"
    path.write_text("")
    assert fails(path) == f"{path} is a file; expected a model folder, a .gguf file or a hub id"
    assert fails(tmp_path / "x.gguf") == f"no such file: {tmp_path / 'x.gguf'}; expected a GGUF file"


def test_model_without_chat_template(fails, untemplated, pairs_file):
    line = fails(untemplated, "--pairs", pairs_file)
    assert line == (
        f"{untemplated} has no chat template; expected a chat model; "
        "pass chat_template='plain' (command: --chat-template plain) for 'User: ... Assistant:'"
    )
    # past that, the next thing that is wrong with this model is that it refuses nothing
    assert "refuses 0 of 4" in fails(untemplated, "--pairs", pairs_file, "--chat-template", "plain", code=3)


def test_template_options(fails, saved, pairs_file):
    assert fails(saved.folder, "--template-option", "system") == "--template-option 'system'; expected NAME=VALUE"
    given = ["--template-option", "depth=3", "system=you help"]
    line = "the chat template reads no option 'depth'; expected one of ['system']"
    assert fails(saved.folder, "--pairs", pairs_file, *given) == line


def test_template_option_values_are_json_or_text():
    given = ["think=false", "date=2024-07-26", "system=a = b", 'name="3"', "n=3"]
    found = {"think": False, "date": "2024-07-26", "system": "a = b", "name": "3", "n": 3}
    assert dict(map(cli._option, given)) == found


def test_unknown_device_and_dtype(fails, saved):
    line = fails(saved.folder, "--device", "cpuu")
    assert re.fullmatch(r"unknown or unavailable device 'cpuu'; expected one of \['cpu'(, 'cuda')?\]", line)
    assert fails(saved.folder, "--dtype", "int3") == (
        "unknown dtype 'int3'; expected one of ('auto', 'float32', 'bfloat16', 'float16'), or torch's own"
    )


def test_adapter_folder_that_is_none(fails, saved, tmp_path):
    assert fails(saved.folder, "--adapter", tmp_path) == (
        f"no adapter in {tmp_path}; expected a folder with adapter_config.json (peft format)"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert fails(saved.folder, "--adapter", tmp_path) == (
        f"{tmp_path / 'adapter_config.json'} names no peft_type; expected peft's own file"
    )


def test_tokens_that_are_none(fails, saved, pairs_file):
    line = fails(saved.folder, "--pairs", pairs_file, "--refusal-token", "sorry no")
    assert line == "'sorry no' is 2 tokens ['sorry', ' no']; expected one token; pass its first one"
    assert fails(saved.folder, "--comply-token", "sure") == (
        "--comply-token without --refusal-token; expected both, or neither"
    )
    assert fails(saved.folder, "--opener", "sure") == "--opener without --refusal-token; expected both, or neither"
    line = fails(saved.folder, "--pairs", pairs_file, "--refusal-token", "sorry", "--opener", "")
    assert line.startswith("the reply opener '' has no token; expected the first words of a reply, such as")
    tokens = ["--refusal-token", saved.refusal, "--opener", "poem poem"]
    line = fails(saved.folder, "--pairs", pairs_file, *tokens, "--limit", "4")
    assert line.startswith("none of 8 replies begins with the opener 'poem poem'")
    line = fails(saved.folder, "--pairs", pairs_file, "--refusal-token", "sorry", "--comply-token", "sorry")
    assert re.fullmatch(r"tokens \[\d+\] are in the refusal and the comply set", line)


TEMPLATE = "a Jinja chat template, or 'plain'"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--device", "cpuu"], "unknown or unavailable device 'cpuu'; expected one of ['cpu'"),
        (["--dtype", "int3"], "unknown dtype 'int3'; expected one of ('auto', 'float32', "),
        (["--limit", "3"], "limit 3; expected at least 4 pairs"),
        (["--limit", "-1"], "limit=-1; expected at least 1"),
        (["--target", "1.2"], "target 1.2; expected a faithfulness in (0, 1]"),
        (["--target", "nan"], "target nan; expected a faithfulness in (0, 1]"),
        (["--max-nodes", "0"], "max_nodes=0; expected at least 1"),
        (["--budget-seconds", "0"], "budget_seconds 0.0; expected a number above 0, or none"),
        (["--budget-seconds", "inf"], "budget_seconds inf; expected a number above 0, or none"),
        (["--seed", "-1"], "seed=-1; expected at least 0"),
        (["--seed", str(2**63)], f"seed {2**63}; expected below 2**63"),
        (["--level", "edge", "--ablation", "mean"], "ablation 'mean' at level 'edge'; expected 'counterfactual'"),
        (
            ["--level", "edge", "--align", "suffix"],
            "level 'edge' on pairs aligned at the suffix; expected 'node' or 'neuron'",
        ),
        (["--opener", "I'm"], "--opener without --refusal-token; expected both, or neither"),
        (["--comply-token", "sure"], "--comply-token without --refusal-token; expected both, or neither"),
        (["--adapter", "none"], "no adapter in none; expected a folder with adapter_config.json (peft format)"),
        (
            ["--chat-template", "none.jinja"],
            "--chat-template 'none.jinja' is no file; expected a file with a Jinja chat template, or 'plain'",
        ),
        (
            ["--chat-template", "{% if"],
            f"the chat template cannot be read (unexpected 'end of template'); expected {TEMPLATE}",
        ),
        (
            ["--chat-template", "{{ text }}"],
            f"the chat template '{{{{ text }}}}' reads no messages; expected {TEMPLATE}",
        ),
        (["--template-option", "system"], "--template-option 'system'; expected NAME=VALUE"),
        (["--template-option", "a=1", "a=2"], "--template-option a is given twice; expected each name once"),
        (["--file", "model.bin"], "file='model.bin'; expected the name of a .gguf file"),
    ],
)
def test_a_wrong_option_is_said_before_the_model_is_looked_for(fails, pairs_file, given, expected):
    """Here there is no model, and the line is about the option."""
    assert fails("./no-such-model", "--pairs", pairs_file, *given).startswith(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--refusal-token", "sorry no"], "'sorry no' is 2 tokens ['sorry', ' no']; expected one token"),
        (["--refusal-token", "sorry", "--comply-token", "sorry no"], "'sorry no' is 2 tokens ['sorry', ' no']; "),
        (["--refusal-token", "sorry", "sorry"], "tokens [110] are given twice; expected each once"),
        (["--refusal-token", "sorry", "--opener", ""], "the reply opener '' has no token; expected the first words of"),
        (["--template-option", "depth=3"], "the chat template reads no option 'depth'; expected one of ['system']"),
        (
            ["--chat-template", "{{ messages[0].x.y }}"],
            "the chat template cannot render a prompt ('dict object' has no",
        ),
    ],
)
def test_what_needs_a_tokenizer_is_said_before_the_weights_are_read(
    fails, saved, pairs_file, monkeypatch, given, expected
):
    monkeypatch.setattr(mechsafety.models.sources, "_read_folder", lambda *_: pytest.fail("too late"))
    assert fails(saved.folder, "--pairs", pairs_file, *given).startswith(expected)


def test_a_model_folder_that_is_not_there(fails):
    line = fails("models/mine/none")
    assert line.startswith("no such folder or file: models/mine/none; expected 'demo', a hub id, a Hugging Face folder")
    assert fails("./none", "--file", "x.gguf") == "no such folder: ./none; expected a hub id or a folder"


def test_a_chat_template_from_a_file(fails, untemplated, pairs_file, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("Q {{ messages[0]['content'] }} A", encoding="utf-8")
    assert "refuses 0 of 4" in fails(untemplated, "--pairs", pairs_file, "--chat-template", path, code=3)
    path.write_bytes(b"\xff{{ messages }}")
    line = f"--chat-template '{path}' is not UTF-8 text; expected a Jinja chat template"
    assert fails(untemplated, "--pairs", pairs_file, "--chat-template", path) == line


# --- mistakes on the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["map"], 'Command "map" parameter MODEL requires an argument.'),
        (["map", "demo"], 'Command "map" parameter --out requires an argument.'),
        (["map", "demo", "--out", "x", "--bogus"], "Unknown option: --bogus"),
        (
            ["map", "demo", "--out", "x", "--limit", "few"],
            'Invalid value for --limit: unable to convert "few" into int.',
        ),
        (["map", "demo", "--out", "x", "--level", "nodes"], 'Invalid value "nodes" for --level.'),
        (["mop"], 'Unknown command "mop".'),
    ],
)
def test_wrong_usage(run, argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"mechsafety: {expected}")
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_version(run):
    assert run("--version") == Ran(0, f"{ms.__version__}\n", "")


def test_help_names_every_option(run):
    text = run("map", "--help").out
    names = (
        "pairs",
        "align",
        "limit",
        "refusal-token",
        "comply-token",
        "opener",
        "adapter",
        "device",
        "dtype",
        "seed",
        "out",
        "json",
        "goal",
        "search",
        "ablation",
        "quick",
        "resume",
        "ray",
        "replicas",
    )
    assert [name for name in (*names, "chat-template") if f"--{name}" not in text] == []


def test_the_installed_module_runs(tmp_path):
    """The same through a process of its own, as a shell sees it; no heavy library is loaded to say so."""
    argv = [
        sys.executable,
        "-m",
        "mechsafety",
        "map",
        "demo",
        "--out",
        str(tmp_path / "out"),
        "--pairs",
        "none.jsonl",
    ]
    ran = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"mechsafety: no such file: none.jsonl; expected {FILE}\n"
    assert list(tmp_path.iterdir()) == []


# --- the output folder ------------------------------------------------------------------------------------------------


def test_output_folder_that_holds_something_else(fails, saved, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    assert fails(saved.folder, out=folder) == (
        "the output folder 'thesis' holds something else (chapter1.tex); "
        "expected a new or empty folder, or one with an earlier result; choose another folder"
    )
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("chapter1.tex", "years of work")]
    assert fails(saved.folder, out=folder / "chapter1.tex") == (
        "'chapter1.tex' is a file; expected a folder to write into; choose another name"
    )


def test_output_folder_that_cannot_be_written_to(fails, saved, tmp_path):
    """Known before the model is loaded: here there is none."""
    (tmp_path / "notes").write_text("mine")
    place = tmp_path / "notes" / "out"
    assert fails("no/such-model", out=place) == (
        f"cannot write '{place}' (File exists); expected a place that can be written to"
    )


def test_an_almost_full_disk(fails, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=3 * 2**20))
    assert fails("no/such-model") == (
        "the disk of 'results' has 3 MiB left; expected at least 32 MiB; free some space, or choose another folder"
    )


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_cleans_up(tmp_path, number, code, word):
    """Ctrl-C, and what batch systems send at a time limit, when the work is about to begin."""
    program = f"""if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
        from mechsafety import cli
        def begin(folder, needed):
            assert os.listdir("new") == [folder.name], "the scratch folder is there"
            os.kill(os.getpid(), signal.{number})
        cli.check_free_space = begin
        cli.main(["map", "demo", "--out", "new/out"])
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert ran.stderr == f"mechsafety: {word}; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def heard():
    """Ctrl-C interrupts, also where the tests are a job in the background, which inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("stage", ["load", 1, 3, 5, 6, "write"])
@pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_cleans_up_at_every_stage(fails, saved, pairs_file, monkeypatch, stage, number, code, word):
    """While the model loads, in stages of the map, and when half of the files are written."""

    def strikes(*_, **__):
        os.kill(os.getpid(), number)
        pytest.fail("the work goes on")

    def begin(self, name, *_):
        self.n += 1
        if self.n == stage:
            strikes()

    def write(circuit, folder):
        (folder / "circuit.json").write_text("half")
        strikes()

    if stage == "load":
        monkeypatch.setattr(mechsafety.models.sources, "_read_folder", strikes)
    monkeypatch.setattr(mechsafety.progress.Stages, "begin", begin)
    if stage == "write":
        monkeypatch.setattr(mechsafety.viz, "write_all", write)
    model, *options = map_argv(saved, pairs_file, Path("unused"))[1:-2]
    assert fails(model, *options, code=code) == f"{word}; nothing was written"


def test_a_signal_from_outside(saved, pairs_file, tmp_path):
    """As a batch system sends it: to a process of its own, in the middle of the work."""
    out = tmp_path / "new" / "out"
    argv = [sys.executable, "-m", "mechsafety", *map_argv(saved, pairs_file, out)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("[2/6]"):
                process.terminate()
        assert process.stdout.read() == ""
    assert process.returncode == 143, lines
    assert lines[-1] == "mechsafety: terminated; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_was_stopped_goes_on(run, saved, pairs_file, tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    argv = [*map_argv(saved, pairs_file, out), "--resume", str(kept)]
    with subprocess.Popen([sys.executable, "-m", "mechsafety", *argv], stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("[3/6]"):
                process.terminate()
    assert process.returncode == 143, lines
    assert lines[-1] == (
        f"mechsafety: terminated; finished work is kept in {kept}, and the same command goes on from there\n"
    )
    items = set(kept.rglob("*.safetensors"))
    assert items and not out.exists()
    assert run(*argv).code == 0
    assert items < set(kept.rglob("*.safetensors"))
    alone = tmp_path / "alone"
    assert run(*map_argv(saved, pairs_file, alone)).code == 0
    assert (out / "circuit.json").read_bytes() == (alone / "circuit.json").read_bytes()
    ran = run(*map_argv(saved, pairs_file, tmp_path / "other"), "--seed", "1", "--resume", str(kept))
    assert ran.code == 2 and "with another options" in ran.err


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_once_the_map_is_written(run, saved, pairs_file, tmp_path, monkeypatch, number, code, word):
    """Files in their places are not called "nothing", and the move of the files is not cut in two."""
    out = tmp_path / "out"
    real = mechsafety.output._move_in

    def moving(*args):
        os.kill(os.getpid(), number)
        real(*args)

    monkeypatch.setattr(mechsafety.output, "_move_in", moving)
    monkeypatch.setattr(cli, "_show", lambda *_: os.kill(os.getpid(), number))
    ran = run(*map_argv(saved, pairs_file, out))
    assert ran.code == code
    assert ran.err.splitlines()[-1] == f"mechsafety: {word} after the map was written; it is whole in {out}"
    assert sorted(path.name for path in out.iterdir()) == FILES and RefusalCircuit.load(out / "circuit.json").nodes


def shown(text: str, out, **env: str) -> tuple[int, str]:
    """Exit code and stderr of a process that prints a summary to a file."""
    program = "import sys, pathlib, mechsafety.cli as cli; sys.exit(cli._show(sys.argv[1], pathlib.Path('o')))"
    argv = [sys.executable, "-c", program, text]
    ran = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | env, check=False)
    return ran.returncode, ran.stderr


def test_a_summary_that_cannot_be_printed(tmp_path):
    """The map is done by then, and the line says where it is."""
    line = "mechsafety: the summary was not printed ({}); the map is whole in o\n"
    with Path("/dev/full").open("w") as full:
        assert shown("text", full) == (141, line.format("No space left on device"))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        assert shown("text", closed) == (141, line.format("Broken pipe"))


def test_a_summary_on_a_terminal_that_lacks_characters(tmp_path):
    with (tmp_path / "seen").open("w") as out:
        assert shown("I\u2019m", out, PYTHONIOENCODING="ascii") == (0, "")
    assert (tmp_path / "seen").read_text() == "I\\u2019m\n"


# --- a model that does not refuse -------------------------------------------------------------------------------------


def test_a_model_that_does_not_refuse(fails, saved, pairs_file):
    assert fails(saved.folder, "--pairs", pairs_file, code=3) == (
        "the model refuses 0 of 4 harmful and 0 of 4 harmless prompts, so there is no refusal to map; "
        "use an aligned chat model, other pairs, or pass refusal tokens if its refusals are not recognised"
    )


def test_a_first_look_is_marked_as_preliminary(run, saved, pairs_file, tmp_path):
    tokens = ["--refusal-token", saved.refusal, "--comply-token", saved.comply]
    out = tmp_path / "out"
    ran = run(
        "map",
        str(saved.folder),
        "--pairs",
        str(pairs_file),
        *tokens,
        "--quick",
        "--ablation",
        "mean",
        "--out",
        str(out),
    )
    assert ran.code == 0, ran.err
    assert ran.out.startswith("preliminary ") and "others" in ran.out
    circuit = RefusalCircuit.load(out / "circuit.json")
    assert circuit.preliminary and repr(circuit).startswith("RefusalCircuit(preliminary: ")
    options = circuit.provenance.options
    assert (options["limit"], options["n_random"], options["n_resamples"]) == (16, 40, 100)
    assert circuit.ablation == "mean" and len(circuit.verification.stability.jaccards) == 100
    for name in ("report.html", "circuit.svg", "circuit.tex"):
        assert "Preliminary: a first look" in (out / name).read_text(encoding="utf-8"), name
    assert "mean over the harmless prompts" in (out / "report.html").read_text(encoding="utf-8")


def test_a_model_that_answers_harm_and_refuses_the_rest(fails, saved, tmp_path):
    path = write_pairs(tmp_path / "mine.jsonl", HARMLESS, HARMFUL)
    tokens = ["--refusal-token", saved.refusal, "--comply-token", saved.comply]
    assert fails(saved.folder, "--pairs", path, *tokens, code=3) == (
        "the model refuses 0% of 4 harmful and 100% of 4 harmless prompts; "
        "only 0 of 2 pairs have a refused harmful prompt and an answered harmless one; "
        "use a model that refuses, or pairs it tells apart"
    )


# --- the whole run ----------------------------------------------------------------------------------------------------


def map_argv(saved: Saved, pairs_file: Path, out: Path, *more: str) -> list[str]:
    tokens = ["--refusal-token", saved.refusal, "--comply-token", saved.comply]
    return ["map", str(saved.folder), "--pairs", str(pairs_file), *tokens, "--limit", "4", "--out", str(out), *more]


def test_a_whole_run(run, saved, pairs_file, tmp_path):
    one = tmp_path / "one"
    ran = run(*map_argv(saved, pairs_file, one, "--json"))
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in one.iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "no scratch folder is left"
    assert ran.out.count("\n") == 1
    summary = json.loads(ran.out)
    circuit = RefusalCircuit.load(one / "circuit.json")
    assert summary["out"] == str(one)
    assert summary["model"] == circuit.provenance.model == "tiny-llama"
    assert summary["nodes"] == len(circuit.nodes) > 0
    assert summary["claims"] == {claim.name: claim.passed for claim in circuit.verification.claims}
    assert len(summary["claims"]) == 10 and summary["left_out"] == []
    assert summary["candidates"] == circuit.n_candidates == 2 * 4 + 2
    assert summary["behaviour"] == {"harmful": 1.0, "harmless": 0.0}
    counts = {kind: value.kinds for kind, value in circuit.behaviour.items()}
    assert summary["degenerate"] == {kind: found.degenerate / 8 for kind, found in counts.items()}
    assert circuit.metric == {
        "name": "logit_difference",
        "refusal_tokens": [saved.refusal],
        "comply_tokens": [saved.comply],
        "refusal_ids": [saved.ids[0]],
        "comply_ids": [saved.ids[1]],
    }
    assert circuit.provenance.seed == 0
    assert str(saved.folder.parent) not in (one / "report.html").read_text(encoding="utf-8"), "a machine's path"

    # again into the same folder, which is replaced whole, and in a process of its own, where sets are ordered otherwise
    first = {name: (one / name).read_bytes() for name in ("circuit.json", "circuit.svg")}
    (one / "circuit.svg").unlink()
    (one / "report.html").write_text("an earlier one")
    (one / "notes.md").write_text("of the user")
    (one / "talk").mkdir()
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    argv = [sys.executable, "-m", "mechsafety", *map_argv(saved, pairs_file, one)]
    again = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in one.iterdir()) == sorted([*FILES, "notes.md", "talk"])
    assert (one / "notes.md").read_text() == "of the user", "what somebody put beside an earlier map stays"
    assert (one / "report.html").read_text(encoding="utf-8") != "an earlier one"
    assert {name: (one / name).read_bytes() for name in first} == first
    lines = again.stdout.splitlines()
    assert lines[0].startswith("harmful refused")
    assert "100% of 4" in lines[0]
    assert lines[-1] == f"report: {one / 'report.html'}"


@pytest.mark.parametrize("level", ["node", "edge"])
def test_a_map_cut_short_into_the_shells_own_folder(run, saved, tmp_path, monkeypatch, level):
    """Every level prints its summary; what was not measured is null in JSON and said in words; the folder stays."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    mixed = tmp_path.parent / f"{tmp_path.name}.jsonl"
    write_pairs(mixed, [*HARMFUL, "make a bomb"], [*HARMLESS, "make a big cake"])
    argv = map_argv(saved, mixed, Path(), "--level", level, "--budget-seconds", "0.000001")
    ran = run(*argv, "--json")
    # edges come from the search, and only nodes are left without any
    unfinished = level == "node"
    assert ran.code == (5 if unfinished else 0), ran.err
    line = (
        "mechsafety: the time budget ended before there was a circuit; what was measured is in .; give more --budget-"
    )
    assert (line in ran.err) == unfinished
    summary = json.loads(ran.out, parse_constant=pytest.fail)
    assert summary["unfinished"] == unfinished and (summary["edges"] is None) == unfinished
    assert summary["out"] == "." and summary["random_control_p"] is None and summary["left_out"]
    assert tmp_path.stat().st_ino == before and sorted(os.listdir()) == FILES
    assert Path("circuit.json").stat().st_mode == Path("circuit.pdf").stat().st_mode
    circuit = RefusalCircuit.load("circuit.json")
    assert circuit.level == level
    note = f"1 of 5 pairs left out, which do not align under the tokenizer of {circuit.provenance.model} (pair 5)"
    assert summary["pairs"] == {"used": 4, "tried": 4, "left_out": [note]}
    text = cli._summary(circuit, Path())
    assert text.startswith("no circuit ") == unfinished and bool(re.search(r"^roles ", text, re.M)) != unfinished
    assert "the map speaks for 4 of 4 pairs tried" in text and note in text
    page = Path("report.html").read_text(encoding="utf-8")
    for name in ("report.html", "circuit.svg", "circuit.tex"):
        said = "No circuit: the time budget ended" in Path(name).read_text(encoding="utf-8")
        assert said == unfinished, name
    assert repr(circuit).startswith("RefusalCircuit(unfinished: ") == unfinished
    assert "The map speaks for 4 of the 4 pairs that were tried" in page and f"Before that: {note}." in page
    assert re.findall(r".*\bnan\b.*", text) == [] and re.search(r"random circuits +not measured", text)
    what = f"{len(circuit.edges)} of {circuit.n_candidates} edges" if level == "edge" else "heads and MLPs"
    assert what in text


def test_the_summary_names_the_other_goal_where_a_circuit_restores_more_than_the_model(
    run, saved, pairs_file, tmp_path
):
    assert run(*map_argv(saved, pairs_file, tmp_path / "out")).code == 0
    whole = RefusalCircuit.load(tmp_path / "out" / "circuit.json")
    for low, where in ((1.1, []), (1.3, ["held-out pairs"])):
        check = replace(whole.verification, held_out_ci=(low, 1.5), fresh=None)
        made = replace(whole, verification=check)
        line = (
            "On held-out pairs the circuit restores more than the whole model; --goal match asks for one that does not."
        )
        assert (line in cli._summary(made, tmp_path)) == bool(where)
        assert json.loads(cli._summary_json(made, tmp_path))["overshoots"] == where


def test_what_was_not_measured_is_null(run, saved, pairs_file, tmp_path):
    """Every field of the summary, for a circuit of which nothing was measured; no field is NaN or infinite."""
    out = tmp_path / "out"
    assert run(*map_argv(saved, pairs_file, out)).code == 0
    whole = RefusalCircuit.load(out / "circuit.json")
    bare = replace(whole, verification=whole.subset([whole.nodes[0].node]).verification)
    summary = json.loads(cli._summary_json(bare, out), parse_constant=pytest.fail)
    measured = ["faithfulness", "held_out_faithfulness", "target_reached", "cmd", "fresh_faithfulness"]
    measured += ["random_control_p"]
    assert {name: summary[name] for name in measured} == dict.fromkeys(measured)
    assert summary["claims"] == {"verification": None} and summary["unfinished"] is False
    full = json.loads(cli._summary_json(whole, out), parse_constant=pytest.fail)
    assert set(full) == set(summary) and [name for name in measured if full[name] is None] == ["fresh_faithfulness"]
    inf = float("inf")
    odd = replace(whole, verification=replace(whole.verification, faithfulness=inf, cmd=-inf))
    summary = json.loads(cli._summary_json(odd, out), parse_constant=pytest.fail)
    assert summary["faithfulness"] is None and summary["cmd"] is None


def test_exit_codes_stand_in_one_table(run):
    """The README has the same words as the help."""
    readme = (Path(ms.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", readme, flags=re.M))
    assert table == {str(code): words for code, words in cli.EXIT_CODES.items()}
    text = " ".join(run("map", "--help").out.split()) + " ".join(run("--help").out.split())
    assert [words for words in table.values() if words not in text] == []


def test_pairs_as_a_table_dtype_of_the_checkpoint_and_a_file_of_the_hub(run, tmp_path, monkeypatch):
    """They reach the functions that know them."""
    table = tmp_path / "mine.csv"
    table.write_text("harmful,harmless\n" + "\n".join(map(",".join, zip(HARMFUL, HARMLESS, strict=True))))
    seen = {}

    def load(model, **options):
        seen.update(options)
        raise ms.MechsafetyError("seen enough")

    monkeypatch.setattr(mechsafety.models, "load_model", load)
    ran = run("map", "owner/repo", "--file", "x.gguf", "--pairs", table, "--dtype", "auto", "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (2, "mechsafety: seen enough\n")
    assert (seen["dtype"], seen["file"]) == ("auto", "x.gguf")


def test_a_run_that_fails_while_writing_leaves_the_earlier_one(run, saved, pairs_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "circuit.json").write_text("earlier")

    def full(circuit, folder):
        (folder / "circuit.json").write_text("half")
        raise ms.MechsafetyError("the disk is full")

    monkeypatch.setattr(mechsafety.viz, "write_all", full)
    ran = run(*map_argv(saved, pairs_file, out))
    assert ran.code == 2
    assert ran.err.endswith("mechsafety: the disk is full\n")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("circuit.json", "earlier")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- a folder that was made elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_planted_folder_by_hand(norm, run, tmp_path):
    """A Llama or GPT-2 folder with planted weights, pairs and tokens by hand: the command finds what was planted."""
    made = testbed.planted(seed=7, layers=3, heads=2, norm=norm, decoys=2)
    folder, out = tmp_path / "model", tmp_path / "out"
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    some = made.pairs.sample(12)
    pairs = write_pairs(tmp_path / "pairs.jsonl", list(some.harmful), list(some.harmless))
    ran = run(
        "map", folder, "--pairs", pairs, "--refusal-token", REFUSAL[0], "--comply-token", COMPLIANCE[0], "--out", out
    )
    assert ran.code == 0, ran.err
    circuit = RefusalCircuit.load(out / "circuit.json")
    assert circuit.metric["refusal_tokens"] == [REFUSAL[0]] and circuit.metric["comply_tokens"] == [COMPLIANCE[0]]
    found = testbed.score(circuit, made.truth)
    assert found.found_nodes.f1 == 1.0 and found.decoys_found == () and found.role_accuracy == 1.0
    assert "resampled" in ran.out and f"of {len(circuit.verification.tested)} hold" in ran.out


def test_a_missed_target_is_said_as_it_is():
    """Nothing short of the whole model reaches it, or some set does and the circuit does not."""
    curve = [ms.circuits.circuit.CurvePoint(k / 10, k, 0.09 * k, 0.1 * k) for k in (2, 5, 9, 10)]
    check = SimpleNamespace(aim=Goal(0.8), curve=curve)
    made = SimpleNamespace(
        verification=check, provenance=SimpleNamespace(options={"max_nodes": None}), level="node", n_candidates=10
    )
    though = "though the first 9 nodes of the ranking meet this"
    assert cli._missed(made) == f"On held-out pairs the circuit's faithfulness is not at least 0.8, {though}."
    check.curve = [point for point in curve if point.n_nodes != 9]
    assert (
        cli._missed(made)
        == "No set of nodes short of the whole model has a faithfulness of at least 0.8 on held-out pairs."
    )
    made.provenance.options["max_nodes"] = 5
    assert cli._missed(made) == "No set of at most 5 nodes has a faithfulness of at least 0.8 on held-out pairs."
    check.aim = Goal(0.8, "match")
    assert cli._missed(made).endswith("has a faithfulness of 0.8 to 1.2 on held-out pairs.")
