"""High-level causal models: named variables, what each computes, and the network node that should carry it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.testbed.truth import Truth

HARMLESS, BORDERLINE, HARMFUL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of a causal model.

    Attributes:
        name: Its name.
        parents: Names of the variables or inputs that it is computed from.
        mechanism: Function from the parents' values to its own value, one integer per prompt.
        node: The head or MLP that carries the variable.
        slot: Which input of ``node`` reads the parents.
        role: Role of ``node`` in a refusal circuit.
        position: Position at which ``node`` carries the variable, counted from the end of the prompt.

    Example:
        >>> variable = ms.testbed.certified().causal_model.variable("detect")
        >>> str(variable.node), variable.role
        ('L0.H1', 'detection')
    """

    name: str
    parents: tuple[str, ...]
    mechanism: Callable[..., Int[Tensor, " prompt"]]
    node: Node
    slot: str
    role: str
    position: int


@dataclass(frozen=True, slots=True)
class CausalModel:
    """A causal model of refusal.

    Attributes:
        inputs: Names of the values that are read from a prompt.
        variables: The variables, in the order of computation. The last one is the output: 1 to refuse, 0 to comply.

    Example:
        >>> causal = ms.testbed.certified().causal_model
        >>> [variable.name for variable in causal.variables]
        ['detect', 'context', 'policy', 'evaluate', 'decide', 'produce']
    """

    inputs: tuple[str, ...]
    variables: tuple[Variable, ...]

    def variable(self, name: str) -> Variable:
        """The variable of that name.

        Raises:
            MechsafetyError: No variable has that name.
        """
        for variable in self.variables:
            if variable.name == name:
                return variable
        known = [variable.name for variable in self.variables]
        raise MechsafetyError(f"no variable is called {name!r}", expected=f"one of {known}")

    def run(
        self,
        inputs: Mapping[str, Int[Tensor, " prompt"]],
        interventions: Mapping[str, Int[Tensor, " prompt"]] | None = None,
    ) -> dict[str, Int[Tensor, " prompt"]]:
        """Value of every variable; the variables in ``interventions`` are held at the given values.

        Raises:
            MechsafetyError: An input is missing, or an intervention names no variable.
        """
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise MechsafetyError(f"no values of the inputs {missing}", expected=f"all of {self.inputs}")
        held = dict(interventions or {})
        for name in held:
            self.variable(name)
        values = {name: inputs[name] for name in self.inputs}
        for variable in self.variables:
            computed = variable.mechanism(*(values[parent] for parent in variable.parents))
            values[variable.name] = held.get(variable.name, computed)
        return {variable.name: values[variable.name] for variable in self.variables}

    def truth(self) -> Truth:
        """The circuit of a network that computes this causal model, node by node."""
        nodes = tuple(sorted((variable.node for variable in self.variables), key=lambda node: node.order))
        edges = []
        for variable in self.variables:
            for parent in variable.parents:
                sender = Node("embed") if parent in self.inputs else self.variable(parent).node
                edges.append(Edge(sender, variable.node, variable.slot))
        edges.append(Edge(self.variables[-1].node, Node("logits"), "resid"))
        return Truth(nodes, (), tuple(edges), {variable.node: variable.role for variable in self.variables})


def _copy(value: Int[Tensor, " prompt"]) -> Int[Tensor, " prompt"]:
    return value.clone()


def _evaluate(
    detect: Int[Tensor, " prompt"], context: Int[Tensor, " prompt"], policy: Int[Tensor, " prompt"]
) -> Int[Tensor, " prompt"]:
    """1 for a harmful request, and for a borderline one if the rules are strict or no professional asks."""
    borderline = (detect == BORDERLINE) & ((policy == 1) | (context == 0))
    return ((detect == HARMFUL) | borderline).to(torch.int64)


def refusal_model() -> CausalModel:
    """The causal model of `certified`: detect, context, policy, evaluate, decide, produce.

    Inputs: ``severity`` (0 harmless, 1 borderline, 2 harmful), ``professional`` and ``strict`` (0 or 1).

    Example:
        >>> one = torch.tensor([BORDERLINE])
        >>> inputs = {"severity": one, "professional": one * 1, "strict": one * 0}
        >>> model = refusal_model()
        >>> model.run(inputs)["produce"], model.run(inputs, {"policy": one})["produce"]
        (tensor([0]), tensor([1]))
    """
    variables = (
        Variable("detect", ("severity",), _copy, Node("head", 0, 1), "v", "detection", -2),
        Variable("context", ("professional",), _copy, Node("head", 0, 2), "v", "detection", -2),
        Variable("policy", ("strict",), _copy, Node("head", 1, 0), "v", "detection", -2),
        Variable("evaluate", ("detect", "context", "policy"), _evaluate, Node("mlp", 1), "mlp", "evaluation", -2),
        Variable("decide", ("evaluate",), _copy, Node("head", 2, 3), "v", "decision", -1),
        Variable("produce", ("decide",), _copy, Node("mlp", 3), "mlp", "production", -1),
    )
    return CausalModel(("severity", "professional", "strict"), variables)
