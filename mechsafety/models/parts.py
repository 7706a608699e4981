"""Which parts a model has."""

from mechsafety.errors import MechsafetyError
from mechsafety.models.lens import LensModel
from mechsafety.nodes import Node

# parts that hold a value of their own, which a run can be given from elsewhere
PATCHABLE = ("head", "mlp", "neuron")


def has_node(model: LensModel, node: Node) -> bool:
    """Whether the model has this node; every model has ``embed`` and ``logits``.

    Raises:
        MechsafetyError: A neuron, in a mixture of experts.
    """
    if node.kind == "neuron":
        model.check_neurons()
    sizes = {"head": model.n_heads, "neuron": model.d_mlp}
    return 0 <= (node.layer or 0) < model.n_layers and 0 <= (node.index or 0) < sizes.get(node.kind, 1)


def check_patchable(model: LensModel, node: Node) -> None:
    """Refuse a node whose value cannot be replaced in a run.

    Raises:
        MechsafetyError: ``embed``, ``logits``, no node at all, or one that the model lacks.
    """
    if not isinstance(node, Node) or node.kind not in PATCHABLE:
        raise MechsafetyError(
            f"{node} cannot be patched",
            expected="heads, MLPs or neurons",
            cure="patch the embedding as Site('resid_pre', 0), by activation_patching(..., nodes=[...])",
        )
    if not has_node(model, node):
        raise MechsafetyError(f"{node} does not exist in {model!r}")
