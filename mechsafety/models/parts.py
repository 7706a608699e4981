"""Which parts a model has."""

from dataclasses import replace

from mechsafety.errors import MechsafetyError
from mechsafety.models.lens_model import LensModel
from mechsafety.nodes import NODE_SITES, Node


def check_exists(model: LensModel, node: Node) -> None:
    """Refuse a node that the model lacks; every model has ``embed`` and ``logits``.

    Raises:
        MechsafetyError: The model lacks the node, and the message names the nearest one. Or the node is a neuron, and
            the model is a mixture of experts.
    """
    if node.kind == "neuron":
        model.check_neurons()
    if node.kind in ("embed", "logits"):
        return
    size = {"head": model.n_heads, "neuron": model.d_mlp}.get(node.kind)
    layer = min(max(node.layer or 0, 0), model.n_layers - 1)
    index = None if size is None else min(max(node.index or 0, 0), size - 1)
    if (layer, index) != (node.layer, node.index):
        of_kind = "" if size is None else f" and {node.kind}s 0 to {size - 1}"
        raise MechsafetyError(
            f"{node} does not exist in {model.name}",
            expected=f"layers 0 to {model.n_layers - 1}{of_kind}",
            hint=f"the nearest is {replace(node, layer=layer, index=index)}",
            page="a-part-does-not-exist",
        )


def check_patchable(model: LensModel, node: Node) -> None:
    """Refuse a node whose value cannot be replaced in a run.

    Raises:
        MechsafetyError: The node is ``embed`` or ``logits``, it is not a `Node`, or the model lacks it.
    """
    if not isinstance(node, Node) or node.kind not in NODE_SITES:
        raise MechsafetyError(
            f"{node} cannot be patched",
            expected="heads, MLPs or neurons",
            hint="patch the embedding as Site('resid_pre', 0), by activation_patching(..., nodes=[...])",
        )
    check_exists(model, node)
