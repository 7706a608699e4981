"""Which parts a model has."""

from mechsafety.errors import MechsafetyError
from mechsafety.models.lens_model import LensModel
from mechsafety.nodes import NODE_SITES, Node


def has_node(model: LensModel, node: Node) -> bool:
    """Whether the model has this node; every model has ``embed`` and ``logits``.

    Raises:
        MechsafetyError: The node is a neuron, and the model is a mixture of experts.
    """
    if node.kind == "neuron":
        model.check_neurons()
    sizes = {"head": model.n_heads, "neuron": model.d_mlp}
    return 0 <= (node.layer or 0) < model.n_layers and 0 <= (node.index or 0) < sizes.get(node.kind, 1)


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
    if not has_node(model, node):
        raise MechsafetyError(f"{node} does not exist in {model!r}")
