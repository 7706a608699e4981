"""A page that runs a small planted model in the browser: patch its parts, and watch the log-odds of refusal."""

import base64
from typing import TYPE_CHECKING, Any

from mechsafety.viz.html import joined_script, safe_json, template
from mechsafety.viz.policy import digest

if TYPE_CHECKING:
    from mechsafety.testbed import ExportedModel

# the report's script makes boxes that scroll reachable by the keyboard
SCRIPTS = ("explorable-model.js", "explorable-page.js", "report.js")


def explorable_html(model: "ExportedModel") -> str:
    """A self-contained page for teaching, in which a student finds the circuit of a planted model.

    The weights run in the browser, without server or network. A student types a prompt, patches or ablates heads and
    MLPs, and says beforehand what to expect. The circuit, the decoys and the backups can be revealed at the end. The
    same model gives the same text.

    Args:
        model: What `mechsafety.testbed.exported` took out of a planted model. Two layers with one decoy and one backup
            are enough, and fit on a phone.

    Example:
        >>> from mechsafety.testbed import exported, planted
        >>> page = explorable_html(exported(planted(layers=2, decoys=1, backups=1)))
        >>> page[:15], "https:" in page
        ('<!DOCTYPE html>', False)
    """
    script, style = joined_script(SCRIPTS), template("explorable.css").render().strip()
    return template("explorable.html.j2").render(
        data=safe_json(page_data(model)),
        script=script,
        script_hash=digest(script).strip("'"),
        style=style,
        style_hash=digest(style).strip("'"),
        n_heads=model.layers * model.heads,
        layers=model.layers,
        refusal=" or ".join(model.words[k] for k in model.refusal_ids),
    )


def page_data(model: "ExportedModel") -> dict[str, Any]:
    """What the page's script needs: the weights as little-endian float32 in base64, words, and the truth."""
    raw = b"".join(tensor.astype("<f4").tobytes() for tensor in model.tensors.values())
    truth = model.truth
    members = [*truth.nodes, *truth.decoys]
    return {
        "layers": model.layers,
        "heads": model.heads,
        "kvHeads": model.kv_heads,
        "eps": model.eps,
        "shapes": {name: list(tensor.shape) for name, tensor in model.tensors.items()},
        "weights": base64.b64encode(raw).decode("ascii"),
        "words": model.words,
        "special": model.special,
        "before": model.before,
        "after": model.after,
        "refusal": model.refusal_ids,
        "twins": model.twins,
        "examples": model.examples,
        "longest": model.longest,
        # heads and MLPs; the page has no neurons
        "roles": {str(node): truth.roles.get(node, "decoy") for node in members if node.kind != "neuron"},
        "backups": [[str(node) for node in group] for group in truth.backups],
        "edges": [[str(edge.sender), str(edge.receiver), edge.slot] for edge in truth.edges],
    }
