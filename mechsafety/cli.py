"""The command `mechsafety`."""

import errno
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from mechsafety.codec import read_json
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.output import check_free_space, json_text, output_file, output_folder, uninterrupted, writing
from mechsafety.version import __version__

# those of signals are 128 plus the number of the signal, as in shells
DONE, MISTAKE, NOTHING_TO_MAP, TAMPERED, UNFINISHED, INTERRUPTED, CLOSED, STOPPED = 0, 2, 3, 4, 5, 130, 141, 143
EXIT_CODES = {
    DONE: "The map is written.",
    MISTAKE: "A mistake in what was given, or a place that cannot be written to. Nothing is written.",
    NOTHING_TO_MAP: "The model does not refuse, so there is nothing to map. Nothing is written.",
    UNFINISHED: "The time budget ended before there was a circuit. What was measured is written.",
    INTERRUPTED: "Interrupted by Ctrl-C. Nothing is written.",
    CLOSED: "The map is written, but its summary could not be printed.",
    STOPPED: "Terminated by SIGTERM, as batch systems send it at a time limit. Nothing is written.",
}
FINGERPRINT_CODES = {
    DONE: "The fingerprint is written.",
    MISTAKE: "A mistake in what was given, or a place that cannot be written to. Nothing is written.",
    NOTHING_TO_MAP: "The model does not refuse, so there is no refusal to watch. Nothing is written.",
    INTERRUPTED: "Interrupted by Ctrl-C. Nothing is written.",
    CLOSED: "The fingerprint is written, but this could not be printed.",
    STOPPED: "Terminated by SIGTERM. Nothing is written.",
}
AUDIT_CODES = {
    DONE: "The model is intact.",
    MISTAKE: "A mistake in what was given, or a model of another architecture. There is no verdict.",
    TAMPERED: "The model was tampered with.",
    INTERRUPTED: "Interrupted by Ctrl-C. There is no verdict.",
    CLOSED: "The verdict could not be printed.",
    STOPPED: "Terminated by SIGTERM. There is no verdict.",
}
SERVE_CODES = {
    DONE: "The service was told to stop, by Ctrl-C or SIGTERM.",
    MISTAKE: "A mistake in what was given, or an address that cannot be used. Nothing was served.",
    INTERRUPTED: "Interrupted by Ctrl-C before the service ran.",
    STOPPED: "Terminated by SIGTERM before the service ran.",
}
NEEDED_BYTES = 32 * 2**20  # a report has 5 MB of scripts; the pictures of a large map take a few MB more


def _exit_codes(table: Mapping[int, str], of: str = "") -> str:
    return f"Exit codes{of}:\n" + "\n".join(f"{code:5}  {words}" for code, words in table.items())


app = App(
    name="mechsafety",
    help="Map which parts of a chat model make it refuse, tell whether a model was tampered with, serve it guarded.",
    version=__version__,
    help_format="plaintext",
    help_epilogue=_exit_codes(EXIT_CODES, " of map"),
    suppress_keyboard_interrupt=False,
)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How the model is loaded: the same options for every command.

    Parameters
    ----------
    file
        The .gguf file of the hub repository, or folder, that MODEL names.
    adapter
        Folder of a peft adapter to merge, or a .safetensors file of fine-tuned parts.
    device
        cpu, cuda, mps.
    dtype
        float32, bfloat16, float16; auto for the checkpoint's own.
    device_map
        auto, balanced, balanced_low_0 or sequential: spread a model that is larger than one device over GPUs, memory
        and disk.
    max_memory
        DEVICE=SIZE for --device-map, such as 0=20GiB cpu=60GiB.
    offload_folder
        Folder for weights on disk that the checkpoint does not hold as they are needed.
    chat_template
        A file with a Jinja chat template, the template itself, or "plain" for models without a chat template.
    template_option
        NAME=VALUE for the chat template: system=TEXT, date=2024-07-26, thinking=off or closed, enable_thinking=true.
    """

    file: str | None = None
    adapter: Path | None = None
    device: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    max_memory: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()
    offload_folder: Path | None = None
    chat_template: str | None = None
    template_option: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()

    def checked(self) -> dict[str, Any]:
        """The arguments for `load_model`, with template and template options read and checked."""
        return {
            "file": self.file,
            "adapter": self.adapter,
            "device": self.device,
            "dtype": self.dtype,
            "device_map": self.device_map,
            "max_memory": _max_memory(self.max_memory),
            "offload_folder": self.offload_folder,
            "chat_template": _template(self.chat_template),
            "template_options": _template_options(self.template_option),
        }


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class MetricOptions:
    """Which tokens and words the metric is made of.

    Parameters
    ----------
    refusal_token
        Tokens that begin a refusal. By default they are found from the model's own replies.
    comply_token
        Tokens that begin a compliant reply. They turn the metric into a logit difference.
    opener
        First words of the reply, such as "I'm", after which the refusal tokens are read.
    """

    refusal_token: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()
    comply_token: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()
    opener: str | None = None

    def check(self) -> None:
        """Refuse comply tokens and openers without refusal tokens."""
        for name, given in (("--comply-token", bool(self.comply_token)), ("--opener", self.opener is not None)):
            if given and not self.refusal_token:
                raise MechsafetyError(f"{name} without --refusal-token", expected="both, or neither")


DEFAULT_MODEL, DEFAULT_METRIC = ModelOptions(), MetricOptions()


@app.command(name="map")
def map_command(
    model: str,
    /,
    *,
    out: Path,
    pairs: Path | None = None,
    align: Literal["tokens", "suffix"] = "tokens",
    limit: int | None = None,
    level: Literal["node", "edge", "neuron"] = "node",
    target: float = 0.8,
    goal: Literal["reach", "match"] = "reach",
    search: Literal["gradient", "masks"] = "gradient",
    ablation: Literal["counterfactual", "mean", "optimal"] = "counterfactual",
    max_nodes: int | None = None,
    budget_seconds: float | None = None,
    quick: Annotated[bool, Parameter(negative="")] = False,
    resume: Path | None = None,
    ray: str | None = None,
    replicas: int = 2,
    metric_options: MetricOptions = DEFAULT_METRIC,
    model_options: ModelOptions = DEFAULT_MODEL,
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Map a model's refusal circuit into a folder: circuit.json, report.html, circuit.svg/.pdf/.tex, scores.csv.

    Parameters
    ----------
    model
        "demo", a hub id, a Hugging Face folder or a .gguf file.
    out
        Folder to write: a new folder, or that of an earlier map.
    pairs
        File of pairs, "harmful" and "harmless": .jsonl (one object per line), .json (an array of objects) or .csv. By
        default the built-in pairs.
    align
        tokens: pairs of equal length, patched at every token; suffix: pairs of any lengths, patched at the chat
        template's tokens after the instruction.
    limit
        Number of pairs to try, seven eighths of them held out; 110 by default, 16 with --quick. More pairs are
        tried if the model refuses fewer than half.
    level
        node: heads and MLPs; neuron: heads, MLPs and single neurons; edge: single edges (slow on large models).
    target
        Smallest share of the difference between refusing and answering that is good enough for the circuit.
    goal
        reach: at least the target; match: at most 1 - target away from the whole model, on either side.
    search
        gradient: rank parts by integrated gradients; masks: train masks for all parts together (slower).
    ablation
        What everything outside the circuit takes: its value in the pair's harmless prompt; its mean over them; or
        constants that change the metric least (slower).
    max_nodes
        Largest circuit.
    budget_seconds
        Time for the map in seconds; work that does not fit is left out and listed.
    quick
        A first look on few pairs, with fewer checks; the results are marked as preliminary.
    resume
        Folder of finished work, made if it is missing. If the map is stopped, the same command goes on from there.
    ray
        Address of a Ray cluster that computes the map: "auto", HOST:6379 or ray://HOST:10001; "local" starts one here.
        It needs the extra "ray".
    replicas
        Number of processes of the cluster that compute, each with its own copy of the model.
    seed
        Seed of everything random.
    as_json
        Print the summary as JSON.
    """
    from mechsafety.viz import FILES, write_all

    done = False
    try:
        with ExitStack() as late:
            # opened first, so that a folder that cannot be written to fails at once
            with output_folder(out, FILES) as scratch:
                check_free_space(scratch, NEEDED_BYTES)
                chosen = _pairs_of(pairs, align, level)
                metric_options.check()
                loading = model_options.checked()
                from mechsafety.circuits import MapOptions, map_refusal_circuit
                from mechsafety.scale import RayExecutor, running

                executor = None if ray is None else RayExecutor(None if ray == "local" else ray, replicas)
                pairs_to_try: dict[str, Any] = {} if limit is None else {"limit": limit}
                options = (MapOptions.quick if quick else MapOptions)(
                    **pairs_to_try,
                    level=level,
                    target=target,
                    goal=goal,
                    search=search,
                    ablation=ablation,
                    max_nodes=max_nodes,
                    budget_seconds=budget_seconds,
                    seed=seed,
                )
                with running(resume, executor=executor):
                    lens, chosen, metric = _loaded(chosen, metric_options, model, loading)
                    circuit = map_refusal_circuit(lens, chosen, metric, options)
                with writing(out):
                    write_all(circuit, scratch)
                late.enter_context(uninterrupted())  # the rest takes milliseconds
            done = True
        code = _show(_summary_json(circuit, out) if as_json else _summary(circuit, out), out)
    except KeyboardInterrupt as error:
        word, number = _of_signal(error)
        if not done and resume is not None and resume.is_dir():
            return _say(f"{word}; finished work is kept in {resume}, and the same command goes on from there", number)
        if not done:
            raise
        return _say(f"{word} after the map was written; it is whole in {out}", number)
    if code == DONE and circuit.unfinished:
        return _say(f"{NO_CIRCUIT}; what was measured is in {out}; give more --budget-seconds", UNFINISHED)
    return code


@app.command(name="fingerprint", help_epilogue=_exit_codes(FINGERPRINT_CODES))
def fingerprint_command(
    model: str,
    /,
    *,
    out: Path,
    pairs: Path | None = None,
    n_pairs: int = 6,
    metric_options: MetricOptions = DEFAULT_METRIC,
    model_options: ModelOptions = DEFAULT_MODEL,
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Take the fingerprint of a model that is known to be intact, for later audits of its copies.

    Parameters
    ----------
    model
        "demo", a hub id, a Hugging Face folder or a .gguf file.
    out
        File to write; its name ends in .json.
    pairs
        File of pairs, "harmful" and "harmless"; by default the built-in pairs of the validation split.
    n_pairs
        Number of pairs that are kept, and run in every audit.
    seed
        Seed of the pairs and of the random projections.
    as_json
        Print the summary as JSON.
    """
    if out.suffix != ".json":
        raise MechsafetyError(f"--out {str(out)!r}", expected="a file whose name ends in .json")
    with output_file(out) as scratch:
        from mechsafety.inputs import whole_number
        from mechsafety.prompts import PromptPairs

        whole_number("--n-pairs", n_pairs)
        whole_number("--seed", seed, least=0)
        chosen = PromptPairs.builtin("validation") if pairs is None else PromptPairs.from_file(pairs, "tokens")
        metric_options.check()
        loading = model_options.checked()
        from mechsafety.monitors import TamperAudit

        lens, chosen, metric = _loaded(chosen, metric_options, model, loading)
        audit = TamperAudit.fingerprint(lens, chosen, metric, n_pairs=n_pairs, seed=seed)
        with writing(out):
            scratch.write_text(audit.to_json(), encoding="utf-8", newline="\n")
        size = scratch.stat().st_size
    facts = {
        "out": str(out),
        "model": audit.provenance.model,
        "bytes": size,
        "prompts": len(audit.harmful) + len(audit.harmless),
        "weights_sha256": audit.provenance.weights_sha256,
    }
    said = f"fingerprint of {facts['model']}: {out}, {size / 1000:.0f} kB, {facts['prompts']} prompts"
    return _show(json_text(facts, indent=None) if as_json else said, out, "the fingerprint is whole in {}")


@app.command(name="audit", help_epilogue=_exit_codes(AUDIT_CODES))
def audit_command(
    model: str,
    /,
    *,
    fingerprint: Path,
    model_options: ModelOptions = DEFAULT_MODEL,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Say whether a model is still the one that was fingerprinted, and where it was tampered with.

    Parameters
    ----------
    model
        The suspect: "demo", a hub id, a Hugging Face folder or a .gguf file.
    fingerprint
        File that "mechsafety fingerprint" wrote.
    as_json
        Print the verdict, all tests and all findings as JSON.
    """
    loading = model_options.checked()
    if not fingerprint.exists():
        raise MechsafetyError(
            f"no such file: {str(fingerprint)!r}", expected="a file that 'mechsafety fingerprint' wrote"
        )
    from mechsafety.models import load_model
    from mechsafety.monitors import TamperAudit

    audit = TamperAudit.load(fingerprint)
    suspect = load_model(model, **loading)
    report = audit.check(suspect)
    facts = {
        "model": report.provenance.model,
        "fingerprint": report.fingerprint,
        "tampered": report.tampered,
        "identical": report.identical,
        "score": report.score,
        "tests": report.tests_dataframe().to_dict("records"),
        "findings": report.to_dataframe().to_dict("records"),
        "notes": list(report.notes),
    }
    text = json_text(facts, indent=None) if as_json else report.summary()
    shown = _show(text, fingerprint, "ask again: nothing of the verdict is kept")
    if shown != DONE or not report.tampered:
        return shown
    return _say(f"{facts['model']} was tampered with (score {report.score:.2f}, limit 1)", TAMPERED)


@app.command(name="serve", help_epilogue=_exit_codes(SERVE_CODES))
def serve_command(
    model: str,
    /,
    *,
    guard: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    token_file: Path | None = None,
    without_token: Annotated[bool, Parameter(negative="")] = False,
    max_waiting: int = 64,
    max_seconds: float = 60.0,
    max_new_tokens: int = 512,
    max_prompt_tokens: int = 2048,
    grace_seconds: float = 30.0,
    model_options: ModelOptions = DEFAULT_MODEL,
) -> int:
    """Serve a model over HTTP: /generate, /score, /healthz, /metrics and /docs, until Ctrl-C or SIGTERM.

    It needs the extra "serve". Logs are JSON lines on stderr, without the text of prompts and replies. After Ctrl-C or
    SIGTERM it finishes the requests that it has accepted, and its exit code is 0.

    Parameters
    ----------
    model
        "demo", a hub id, a Hugging Face folder or a .gguf file.
    guard
        File or folder of a saved guard or monitor. Prompts that the guard judges unsafe get no reply. A reply ends
        before the first token that a monitor flags.
    host
        Address to listen on. One that other machines reach needs a token.
    port
        Port to listen on; 0 takes a free one, which the log names.
    token_file
        File with the bearer token that requests need.
    without_token
        Serve an address that other machines reach to everybody.
    max_waiting
        Number of requests that may wait for the one that runs; further ones get 429.
    max_seconds
        Longest time per request, waiting included.
    max_new_tokens
        Longest reply that a request may ask for, in tokens.
    max_prompt_tokens
        Longest chat prompt, in tokens.
    grace_seconds
        How long accepted requests may go on after the service was told to stop.
    """
    from mechsafety.service import ServiceLimits, bound_socket, read_token, serve
    from mechsafety.service.judge import load_protection, protection_type

    limits = ServiceLimits(
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        waiting=max_waiting,
        seconds=max_seconds,
        grace_seconds=grace_seconds,
    )
    loading = model_options.checked()
    token = None if token_file is None else read_token(token_file)
    if guard is not None:
        protection_type(guard)
    # all mistakes that can be seen without the model are said before it is loaded
    with bound_socket(host, port, token=token is not None, without_token=without_token) as bound:
        from mechsafety.models import load_model

        lens = load_model(model, **loading)
        protection = None if guard is None else load_protection(guard, lens)
        serve(lens, protection, token=token, without_token=without_token, limits=limits, bound=bound)
    return DONE


NO_CIRCUIT_ROW = ("no circuit", "the time budget ended before edges and roles were measured; these parts are a ranking")
NO_CIRCUIT = "the time budget ended before there was a circuit"


def _pairs_of(path: Path | None, align: Literal["tokens", "suffix"], level: str) -> Any:
    """The pairs of a file, or the built-in ones, if circuits of this level can be found on them."""
    from mechsafety.prompts import PromptPairs

    if path is None and align != "tokens":
        raise MechsafetyError(f"--align {align} without --pairs", expected="a file of pairs of any lengths")
    found = PromptPairs.builtin() if path is None else PromptPairs.from_file(path, align)
    from mechsafety.circuits.levels import LEVELS

    LEVELS[level].check_align(align)
    return found


def _template(given: str | None) -> str | None:
    """The chat template: of a file, as it is given, or ``plain``."""
    if given is None or given == "plain" or "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise MechsafetyError(
            f"--chat-template {given!r} is no file", expected="a file with a Jinja chat template, or 'plain'"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise MechsafetyError(
            f"--chat-template {given!r} is not UTF-8 text", expected="a Jinja chat template"
        ) from None


def _template_options(given: tuple[str, ...]) -> dict[str, Any]:
    """The chat template's options by name."""
    found: dict[str, Any] = {}
    for name, value in map(_option, given):
        if name in found:
            raise MechsafetyError(f"--template-option {name} is given twice", expected="each name once")
        found[name] = value
    return found


def _max_memory(given: tuple[str, ...]) -> dict[int | str, str] | None:
    """Most bytes per device: GPUs by their number, other places by name."""
    found: dict[int | str, str] = {}
    for place in given:
        name, equals, size = place.partition("=")
        if not (name and equals and size):
            raise MechsafetyError(f"--max-memory {place!r}", expected="DEVICE=SIZE, such as 0=20GiB or cpu=60GiB")
        found[int(name) if name.isdecimal() else name] = size
    return found or None


def _loaded(pairs: Any, metric_options: MetricOptions, model: str, loading: Mapping[str, Any]) -> Any:
    """The model, the pairs that align under its tokenizer, and the metric of the given tokens.

    Pairs and tokens are checked as soon as there is a tokenizer, before the model's weights are read.

    Args:
        pairs: All pairs.
        metric_options: Refusal tokens, comply tokens and the opener.
        model: As `load_model` takes it.
        loading: Its other arguments.
    """
    from mechsafety.circuits.draw import MIN_PAIRS
    from mechsafety.metrics import RefusalLogOdds
    from mechsafety.models import load_model

    refusal, metric = metric_options.refusal_token, None

    def fit(chat: Any) -> None:
        nonlocal pairs, metric
        pairs = pairs.aligned(chat, least=2 * MIN_PAIRS)
        if refusal:
            metric = RefusalLogOdds.of_tokenizer(
                chat.tokenizer, refusal, metric_options.comply_token, opener=metric_options.opener
            )

    lens = load_model(model, on_tokenizer=fit, **loading)
    return lens, pairs, metric


def _option(text: str) -> tuple[str, Any]:
    """A template option from ``NAME=VALUE``; the value is read as JSON if it is JSON, otherwise as text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise MechsafetyError(f"--template-option {text!r}", expected="NAME=VALUE")
    try:
        return name, read_json(value, parse_constant=str)
    except json.JSONDecodeError:
        return name, value


def _summary_json(circuit: Any, out: Path) -> str:
    check = circuit.verification
    return json_text(
        {
            "out": str(out),
            "model": circuit.provenance.model,
            "preliminary": circuit.preliminary,
            "unfinished": circuit.unfinished,
            "nodes": len(circuit.nodes),
            "candidates": circuit.n_candidates,
            "edges": None if circuit.unfinished else len(circuit.edges),
            "faithfulness": check.faithfulness,
            "held_out_faithfulness": check.held_out_faithfulness,
            "target": check.target,
            "goal": check.goal,
            "target_reached": check.reached if check.measured else None,
            "overshoots": list(check.overshoots) if check.measured else None,
            "cmd": check.cmd,
            "fresh_faithfulness": None if check.fresh is None else check.fresh.faithfulness,
            "random_control_p": check.random_p,
            "claims": {claim.name: claim.passed for claim in check.claims},
            "left_out": list(circuit.search.cut),
            "behaviour": {kind: value.refusal_rate for kind, value in circuit.behaviour.items()},
            "degenerate": {
                kind: None if value.kinds is None else value.kinds.share("degenerate")[0]
                for kind, value in circuit.behaviour.items()
            },
            "pairs": _pairs(circuit),
        },
        indent=None,
    )


def _pairs(circuit: Any) -> dict[str, Any]:
    """Number of pairs that the map speaks for, number of pairs tried, and notes on pairs left out before."""
    used, tried = circuit.speaks_for or (None, None)
    return {"used": used, "tried": tried, "left_out": circuit.provenance.options.get("left_out", [])}


def _summary(circuit: Any, out: Path) -> str:
    check = circuit.verification
    held, controls, (low, high) = check.held_out_faithfulness, check.random_controls, check.held_out_ci
    rows: list[tuple[str, str]] = []
    if circuit.unfinished:
        rows.append(NO_CIRCUIT_ROW)
    if circuit.preliminary:
        rows.append(("preliminary", "a first look on few pairs, with fewer checks; run again without --quick"))
    for kind, value in circuit.behaviour.items():
        a, b = value.refusal_ci
        babble = "" if value.kinds is None else f"; degenerate replies {value.kinds.share('degenerate')[0]:.0%}"
        rows.append((f"{kind} refused", f"{value.refusal_rate:.0%} of {value.n} (95 % CI {a:.0%} to {b:.0%}){babble}"))
    pairs = _pairs(circuit)
    if pairs["used"]:
        share = f"the map speaks for {pairs['used']} of {pairs['tried']} pairs tried, refused on the harmful side alone"
        rows.append(("pairs", share))
    rows += [("  left out", note) for note in pairs["left_out"]]
    if circuit.level == "edge":
        size = f"{len(circuit.edges)} of {circuit.n_candidates} edges, between {len(circuit.nodes)} nodes"
    else:
        size = f"{len(circuit.nodes)} of {circuit.n_candidates} {_PARTS[circuit.level]}"
        size += f" ({len(circuit.nodes) / circuit.n_candidates:.0%})"
    rows += [
        ("metric", f"{circuit.metric['name']}, refusal tokens {circuit.metric['refusal_tokens']}"),
        *_read(circuit.metric),
        ("circuit", size),
        ("faithfulness", _measured(check.faithfulness, f"{check.faithfulness:.2f} on the pairs it was found on")),
        ("  held out", _measured(held, f"{held:.2f} (95 % CI {low:.2f} to {high:.2f}), asked for {check.aim.words}")),
        *([("  fresh pairs", _fresh(check.fresh))] if check.fresh is not None else []),
        ("  over all sizes", _measured(check.cmd, f"CMD {check.cmd:.2f}, the mean distance from 1 (0 is best)")),
        ("  random circuits", _measured(controls.mean, f"mean {controls.mean:.2f}, p = {check.random_p:.3g}")),
        ("  removing it", _measured(check.necessity, f"loses {check.necessity:.0%} of the gap")),
        *([("  resampled", _stability(check.stability))] if check.stability is not None else []),
        *([] if circuit.unfinished else _wiring(circuit)),
        ("claims", _claims(check)),
        *([("backups", _backups(circuit))] if circuit.search.backups else []),
        *([("  the others", circuit.ablation)] if circuit.ablation != "counterfactual" else []),
        *(("left out", line) for line in circuit.search.cut),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    if check.measured and not check.reached:
        lines.append(_missed(circuit))
    if check.overshoots:
        where = " and ".join(check.overshoots)
        lines.append(
            f"On {where} the circuit restores more than the whole model; --goal match asks for one that does not."
        )
    return "\n".join([*lines, f"report: {out / 'report.html'}"])


def _missed(circuit: Any) -> str:
    """The line that says that the circuit misses its goal, and whether any set that was tried meets it."""
    check, most = circuit.verification, circuit.provenance.options.get("max_nodes")
    parts = {"node": "nodes", "edge": "edges", "neuron": "parts"}[circuit.level]
    largest = circuit.n_candidates - 1 if most is None else most
    goal = check.aim
    enough = [p for p in check.curve if p.n_nodes <= largest and goal.met(p.faithfulness, p.held_out)]
    if enough:
        size = f"the first {enough[0].n_nodes} {parts} of the ranking meet this"
        return f"On held-out pairs the circuit's faithfulness is not {goal.words}, though {size}."
    set_of = f"set of {parts} short of the whole model" if most is None else f"set of at most {most} {parts}"
    return f"No {set_of} has a faithfulness of {goal.words} on held-out pairs."


_PARTS = {"node": "heads and MLPs", "neuron": "heads, MLPs and neurons"}


def _measured(value: float, text: str) -> str:
    return text if math.isfinite(value) else "not measured"


def _claims(check: Any) -> str:
    """How many of the tested claims hold, and the names of the claims with any other verdict."""
    found = f"{check.tally} hold"
    words = {"fails": "failed", "holds by construction": "by construction"}
    others = {verdict: names for verdict, names in check.by_verdict.items() if verdict != "holds"}
    return found + "".join(f"; {words.get(verdict, verdict)}: {', '.join(names)}" for verdict, names in others.items())


def _fresh(fresh: Any) -> str:
    low, high = fresh.ci
    return f"{fresh.faithfulness:.2f} (95 % CI {low:.2f} to {high:.2f}) on {fresh.n} pairs used for nothing before"


def _stability(found: Any) -> str:
    return (
        f"the first parts of the ranking overlap by {found.mean:.2f} (mean Jaccard) on {len(found.jaccards)} resamples"
    )


def _read(metric: Any) -> list[tuple[str, str]]:
    """Lines that say where the metric reads, and how well it tells refused from answered prompts at each place."""
    from mechsafety.results import parting, reads_where

    tried = [("  tells refused", f"{where}: AUROC {value}") for where, value in parting(metric)]
    return [("  read", reads_where(metric).removeprefix("read ")), *tried] if tried or metric.get("opener") else []


def _backups(circuit: Any) -> str:
    """The backups that were found: those that the circuit holds, which its size counts, and the others."""
    nodes = [backup.node for backup in circuit.search.backups]
    sides = {
        "in the circuit": [str(node) for node in nodes if node in circuit],
        "found but not kept": [str(node) for node in nodes if node not in circuit],
    }
    return "; ".join(f"{', '.join(names)} {where}" for where, names in sides.items() if names)


def _wiring(circuit: Any) -> list[tuple[str, str]]:
    """Lines on edges and roles."""
    roles = ", ".join(f"{len(circuit.by_role(role))} {role}" for role in _roles(circuit))
    return [("edges", f"{len(circuit.edges)} kept"), ("roles", roles)]


def _roles(circuit: Any) -> list[str]:
    from mechsafety.circuits.circuit import ROLES

    return [role for role in ROLES if circuit.by_role(role)]


def _show(text: str, out: Path, kept: str = "the map is whole in {}") -> int:
    """Print the summary; if it cannot be printed (no reader, full disk), say what is complete all the same."""
    try:
        if sys.stdout is None:  # the shell closed it: mechsafety ... >&-
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        # a terminal that lacks a token's characters shows their code points
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201
    except OSError as error:
        if sys.stdout is not None:  # the rest of the buffer would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _say(f"the summary was not printed ({error.strerror}); {kept.format(out)}")
        return CLOSED
    return 0


class _Stopped(KeyboardInterrupt):
    """The process was asked to end."""


def _of_signal(error: KeyboardInterrupt) -> tuple[str, int]:
    """What ended the work, and its exit code."""
    return ("terminated", STOPPED) if isinstance(error, _Stopped) else ("interrupted", INTERRUPTED)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Context in which a termination signal cleans up as Ctrl-C does; batch systems send it at a time limit."""

    def stop(*_: object) -> None:
        raise _Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Patient:
    """A stream that drops what a terminal that went away can no longer show, so that the work goes on.

    Args:
        stream: The stream, or None where the shell closed it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        with suppress(OSError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and bool(self._stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _patient() -> Iterator[None]:
    """Context in which a broken stderr stops nothing."""
    before = sys.stderr
    sys.stderr = cast(Any, _Patient(before))
    try:
        yield
    finally:
        sys.stderr = before


def main(argv: list[str] | None = None) -> None:
    """Run the command and exit with one of its codes; every code except 0 comes with one line on stderr."""
    with _patient():
        sys.exit(_code(argv))


def _code(argv: list[str] | None) -> int:
    """Run the command; its exit code."""
    try:
        with _stoppable():
            code = app(
                argv,
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
        return code if isinstance(code, int) else 0
    except NoRefusal as error:
        return _say(error, NOTHING_TO_MAP)
    except (MechsafetyError, CycloptsError, OSError) as error:
        return _say(error, MISTAKE)
    except KeyboardInterrupt as error:
        word, number = _of_signal(error)
        return _say(f"{word}; nothing was written", number)


def _say(error: Exception | str, code: int = MISTAKE) -> int:
    text = " ".join(str(error).split())
    print(f"mechsafety: {text}", file=sys.stderr)  # noqa: T201
    return code
