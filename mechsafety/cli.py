"""The command `mechsafety`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.version import __version__

MISTAKE, NOTHING_TO_MAP = 2, 3

app = App(
    name="mechsafety",
    help="Map which parts of a chat model make it refuse.",
    version=__version__,
    help_format="plaintext",
)


@app.command(name="map")
def map_command(
    model: str,
    /,
    *,
    out: Path,
    pairs: Path | None = None,
    limit: int = 40,
    level: str = "node",
    max_nodes: int | None = None,
    budget_seconds: float | None = None,
    refusal_token: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    comply_token: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    adapter: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    chat_template: str | None = None,
    template_option: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Map a model's refusal circuit into a folder: circuit.json, report.html, circuit.svg/.pdf/.tex, scores.csv.

    Parameters
    ----------
    model
        "demo", a hub id, a Hugging Face folder or a .gguf file.
    out
        Folder to write; a new one, or that of an earlier map.
    pairs
        JSON lines with {"harmful": "...", "harmless": "..."}; the built-in pairs by default.
    limit
        Pairs to use at most, half of them held out.
    level
        node: heads and MLPs; neuron: the MLPs taken apart; edge: single edges (slow on large models).
    max_nodes
        Largest circuit.
    budget_seconds
        Time for the map; what does not fit is left out and listed.
    refusal_token
        Tokens that begin a refusal; found from the model's own replies by default.
    comply_token
        Tokens that begin a compliant reply; turns the metric into a logit difference.
    adapter
        Folder of a peft adapter to merge.
    device
        cpu, cuda, mps.
    dtype
        float32, bfloat16, float16.
    chat_template
        "plain" for models without a chat template of their own.
    template_option
        NAME=VALUE for the chat template: system=TEXT, date=2024-07-26, enable_thinking=false.
    seed
        Seed of everything random.
    as_json
        Print the summary as JSON.
    """
    from mechsafety.results import check_output_folder, fresh_folder
    from mechsafety.viz import FILES, write_all

    check_output_folder(out.resolve(), FILES)
    prompts = None
    if pairs is not None:
        from mechsafety.prompts import PromptPairs

        prompts = PromptPairs.from_jsonl(pairs)
    if comply_token and not refusal_token:
        raise MechsafetyError("--comply-token without --refusal-token", expected="both, or neither")
    options = dict(map(_option, template_option))
    quiet_libraries()
    from mechsafety.circuits import map_refusal_circuit
    from mechsafety.metrics import RefusalLogOdds
    from mechsafety.models import load_model

    with fresh_folder(out, FILES) as scratch:  # opened first: a place that cannot be written to is known at once
        lens = load_model(
            model,
            adapter=adapter,
            device=device,
            dtype=dtype,
            chat_template=chat_template,
            template_options=options,
        )
        metric = RefusalLogOdds.of(lens, refusal_token, comply_token) if refusal_token else None
        circuit = map_refusal_circuit(
            lens,
            prompts,
            metric,
            level=level,
            limit=limit,
            max_nodes=max_nodes,
            budget_seconds=budget_seconds,
            seed=seed,
        )
        write_all(circuit, scratch)
    print(_summary_json(circuit, out) if as_json else _summary(circuit, out))  # noqa: T201
    return 0


def _option(text: str) -> tuple[str, Any]:
    """A template option from ``NAME=VALUE``; the value is JSON where it can be read as JSON, otherwise text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise MechsafetyError(f"--template-option {text!r}", expected="NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def quiet_libraries() -> None:
    """Keep progress bars and warnings of the libraries underneath off the user's terminal."""
    import warnings

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def _summary_json(circuit: Any, out: Path) -> str:
    check = circuit.verification
    return json.dumps(
        {
            "out": str(out),
            "model": circuit.provenance.model,
            "nodes": len(circuit.nodes),
            "candidates": circuit.n_candidates,
            "edges": len(circuit.edges),
            "faithfulness": check.faithfulness,
            "held_out_faithfulness": check.held_out_faithfulness,
            "target_reached": check.reached,
            "fresh_faithfulness": None if check.fresh is None else check.fresh.faithfulness,
            "random_control_p": check.random_controls.p_value,
            "claims": {claim.name: claim.passed for claim in check.claims},
            "left_out": list(circuit.search.cut),
            "behaviour": {kind: value.refusal_rate for kind, value in circuit.behaviour.items()},
        }
    )


def _summary(circuit: Any, out: Path) -> str:
    check = circuit.verification
    low, high = check.held_out_ci
    rows = []
    for kind, value in circuit.behaviour.items():
        a, b = value.refusal_ci
        rows.append((f"{kind} refused", f"{value.refusal_rate:.0%} of {value.n} (95 % CI {a:.0%} to {b:.0%})"))
    size = f"{len(circuit.nodes)} of {circuit.n_candidates} {_PARTS[circuit.level]}"
    size += f" ({len(circuit.nodes) / circuit.n_candidates:.0%})"
    if circuit.level == "edge":
        size = f"{len(circuit.edges)} of {circuit.n_candidates} edges, between {len(circuit.nodes)} nodes"
    rows += [
        ("metric", f"{circuit.metric['name']}, refusal tokens {circuit.metric['refusal_tokens']}"),
        ("circuit", size),
        ("faithfulness", f"{check.faithfulness:.2f} on the pairs it was found on"),
        ("  held out", f"{check.held_out_faithfulness:.2f} (95 % CI {low:.2f} to {high:.2f}), asked {check.target}"),
        *([("  fresh pairs", _fresh(check.fresh))] if check.fresh is not None else []),
        ("  random circuits", f"mean {check.random_controls.mean:.2f}, p = {check.random_controls.p_value:.3g}"),
        ("  removing it", f"loses {check.necessity:.0%} of the gap"),
        *([("  resampled", _stability(check.stability))] if check.stability is not None else []),
        ("edges", f"{len(circuit.edges)} kept"),
        ("roles", ", ".join(f"{len(circuit.by_role(r))} {r}" for r in _roles(circuit))),
        ("claims", _claims(check.claims)),
        *([("backups", ", ".join(str(b.node) for b in circuit.search.backups))] if circuit.search.backups else []),
        *(("left out", line) for line in circuit.search.cut),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    if not check.reached:
        most = circuit.provenance.options.get("max_nodes")
        set_of = "set of nodes short of the whole model" if most is None else f"set of at most {most} parts"
        lines.append(f"No {set_of} reached {check.target:.2f} on held-out pairs.")
    return "\n".join([*lines, f"report: {out / 'report.html'}"])


_PARTS = {"node": "heads and MLPs", "neuron": "heads, MLPs and neurons"}


def _claims(claims: Any) -> str:
    """How many claims hold, and which fail or were not measured."""
    found = f"{sum(claim.passed is True for claim in claims)} of {len(claims)} hold"
    for word, verdict in (("failed", False), ("not measured", None)):
        names = [claim.name for claim in claims if claim.passed is verdict]
        found += f"; {word}: {', '.join(names)}" if names else ""
    return found


def _fresh(fresh: Any) -> str:
    low, high = fresh.ci
    return f"{fresh.faithfulness:.2f} (95 % CI {low:.2f} to {high:.2f}) on {fresh.n} pairs used for nothing before"


def _stability(found: Any) -> str:
    return (
        f"mean Jaccard overlap {found.mean:.2f} with circuits of {len(found.jaccards)} bootstrap resamples of the pairs"
    )


def _roles(circuit: Any) -> list[str]:
    from mechsafety.circuits.circuit import ROLES

    return [role for role in ROLES if circuit.by_role(role)]


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit 0 done, 2 the user's mistake, 3 nothing to map."""
    try:
        code = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        sys.exit(code if isinstance(code, int) else 0)
    except NoRefusal as error:
        sys.exit(_say(error, NOTHING_TO_MAP))
    except (MechsafetyError, CycloptsError, OSError) as error:
        sys.exit(_say(error, MISTAKE))


def _say(error: Exception, code: int) -> int:
    text = " ".join(str(error).split())
    print(f"mechsafety: {text}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    main()
