"""Readings of a model: small sketches of its weights, and of its activations on fixed prompts."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.inputs import Amount, Prompts, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.placed import check_in_memory, fetched, with_numbers
from mechsafety.models.quantised import quantised
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind

# random probes of each parameter: a change of high rank is known to about 1 / sqrt(2 * 16) = 18 %, one of rank 1
# to about 35 %
PROBES = 16
WRITER_ROWS = 98  # each output matrix has so many random inputs that all together have at least this many, and two
WRAPPER = "._original_component"  # in TransformerLens' names of parameters


@dataclass(frozen=True, slots=True)
class Readings:
    """What a fingerprint keeps of a model. Probes are vectors of signs, drawn from a seed.

    Attributes:
        parameters: Names of the parameters, each once.
        parameter_norms: Frobenius norm of each.
        parameter_probes: ``u @ W @ v`` for probes u and v. The mean square of a change in them estimates the squared
            Frobenius norm of the change in W.
        writers: Names of the matrices that write to the residual stream.
        writer_probes: What each writes for probes as its input.
        head_gains: Norm of each head's output weights times that of its value weights.
        neuron_gains: Norm of each neuron's output weights times that of its input weights. In a gated MLP, these are
            the weights of its linear branch. To scale one up and the other down changes neither the model nor this.
        head_writes: Root mean square of what each head writes, on the harmful (row 0) and the harmless prompts (row 1),
            over the tokens of the instruction and the suffix.
        mlp_writes: The same of each MLP.
        neuron_writes: The same of each neuron, over both kinds of prompts.
        contrast: Residual stream after each block at the last token: mean of the harmful less mean of the harmless
            prompts.
        log_odds: Metric of each prompt, the harmful ones first.
    """

    parameters: tuple[str, ...]
    parameter_norms: Float[Tensor, " parameter"]
    parameter_probes: Float[Tensor, "parameter probe"]
    writers: tuple[str, ...]
    writer_probes: Float[Tensor, "writer input d_model"]
    head_gains: Float[Tensor, "layer head"]
    neuron_gains: Float[Tensor, "layer d_mlp"]
    head_writes: Float[Tensor, "side layer head"]
    mlp_writes: Float[Tensor, "side layer"]
    neuron_writes: Float[Tensor, "layer d_mlp"]
    contrast: Float[Tensor, "layer d_model"]
    log_odds: Float[Tensor, " prompt"]


@public
def read_model(
    model: LensModel,
    harmful: Prompts,
    harmless: Prompts,
    metric: RefusalLogOdds,
    seed: Amount = 0,
) -> Readings:
    """Sketch a model's weights, and run it once on the prompts. Nothing of it changes.

    Args:
        model: The model.
        harmful: Prompts that it should refuse.
        harmless: Prompts that it should answer.
        metric: Refusal log-odds, read at one token.
        seed: Seed of the probes.

    Raises:
        MechsafetyError: A metric of whole openers, or as `LensModel.tokenize`.
    """
    metric.check_one_column()
    with model.lock, torch.no_grad():
        names, norms, probes = _parameters(model, seed)
        writers, written = _writers(model, seed)
        outputs = torch.zeros(model.n_layers, model.d_mlp)
        if model.d_mlp:
            outputs = torch.stack([model.W_out(layer).float().norm(dim=1).cpu() for layer in range(model.n_layers)])
        seen = _Seen(model, len(harmful))
        view = model.reading(metric.opener_ids)
        tokens = view.tokenize([*harmful, *harmless])
        with model.hooks(list(seen.hooks(tokens))):
            logits = view.forward(tokens)[:, -1].float()
        return Readings(
            names,
            norms,
            probes,
            writers,
            written,
            torch.stack([_head_gains(model, layer) for layer in range(model.n_layers)]).cpu(),
            torch.stack([_input_norms(model, layer) for layer in range(model.n_layers)]).cpu() * outputs,
            seen.heads.cpu(),
            seen.mlps.cpu(),
            seen.neurons.cpu() * outputs,
            seen.contrast.cpu(),
            metric(logits).cpu(),
        )


def signs(rows: int, columns: int, seed: int) -> Float[Tensor, "rows columns"]:
    """Random signs, the same for the same sizes and seed.

    Example:
        >>> torch.equal(signs(2, 3, 0), signs(2, 3, 0))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, columns), generator=generator).float() * 2 - 1


def parameter_name(name: str) -> str:
    """A parameter's name without TransformerLens' wrappers.

    Example:
        >>> parameter_name("model.norm._original_component.weight")
        'model.norm.weight'
    """
    return name.replace(WRAPPER, "")


def own_parameters(model: LensModel) -> list[tuple[str, Tensor]]:
    """Every parameter once, also where several names share it.

    Raises:
        MechsafetyError: Weights are offloaded, and the model has fused layers, which TransformerLens has split into
            copies.
    """
    if quantised(model.hf_model):
        check_in_memory(model.hf_model, "reading a fingerprint's weights")
    seen: set[int] = set()
    found = []
    tied = set(getattr(model.hf_model, "all_tied_weights_keys", None) or ())
    running = model.backend.weights()
    for name, own in model.hf_model.named_parameters():
        if own.is_meta and parameter_name(name) in tied:  # offloaded: of tied parameters each is fetched by itself
            continue
        if own.is_meta and name not in running:
            check_in_memory(model.hf_model, "reading the weights of a model with fused layers")
        value = with_numbers(model.hf_model, name) if own.is_meta else own
        if own.is_meta or value.data_ptr() not in seen or not value.numel():
            seen.add(value.data_ptr())
            found.append((parameter_name(name), value.detach()))
    return found


def _parameters(
    model: LensModel, seed: int
) -> tuple[tuple[str, ...], Float[Tensor, " parameter"], Float[Tensor, "parameter probe"]]:
    names, norms, probes = [], [], []
    for index, (name, value) in enumerate(own_parameters(model)):
        weight = torch.atleast_2d(value.float()) if value.ndim < 3 else value.float().flatten(1)
        left, right = (
            signs(PROBES, size, seed + 2 * index + k).to(weight.device) for k, size in enumerate(weight.shape)
        )
        names.append(name)
        norms.append(weight.norm())
        probes.append(((left @ weight) * right).sum(-1))
    return tuple(names), torch.stack(norms).cpu(), torch.stack(probes).cpu()


def _writers(model: LensModel, seed: int) -> tuple[tuple[str, ...], Float[Tensor, "writer input d_model"]]:
    names, rows = list[str](), list[Tensor]()
    many = max(2, math.ceil(WRITER_ROWS / (2 * model.n_layers + 1)))

    def add(name: str, weight: Float[Tensor, "inner d_model"]) -> None:
        probe = signs(many, len(weight), seed + 1_000_003 * (len(names) + 1)).to(weight.device)
        names.append(name)
        rows.append((probe @ weight.float()).cpu())

    embedding = getattr(model.hf_model, "get_input_embeddings", lambda: None)()
    if embedding is not None:
        with fetched(embedding):
            add("embed", embedding.weight)
    for layer in range(model.n_layers):
        add(f"L{layer}.attention", rearrange(model.W_O(layer), "head d_head d_model -> (head d_head) d_model"))
        if model.d_mlp:
            add(f"L{layer}.MLP", model.W_out(layer))
    return tuple(names), torch.stack(rows)


def _head_gains(model: LensModel, layer: int) -> Float[Tensor, " head"]:
    values = model.backend.W_V(layer).float().flatten(1).norm(dim=1)
    values = repeat(values, "kv_head -> (kv_head group)", group=model.n_heads // len(values))
    gains: Tensor = model.W_O(layer).float().flatten(1).norm(dim=1) * values
    return gains


def _input_norms(model: LensModel, layer: int) -> Float[Tensor, " d_mlp"]:
    if not model.d_mlp:
        return torch.zeros(0, device=model.device)
    norms: Tensor = model.backend.W_in(layer).float().norm(dim=0)
    return norms


class _Seen:
    """What hooks see in one run, as sums over tokens; the activations themselves are not kept."""

    def __init__(self, model: LensModel, n_harmful: int) -> None:
        self.model, self.n_harmful = model, n_harmful
        device, layers = model.device, model.n_layers
        self.heads = torch.zeros(2, layers, model.n_heads, device=device)
        self.mlps = torch.zeros(2, layers, device=device)
        self.neurons = torch.zeros(layers, model.d_mlp, device=device)
        self.contrast = torch.zeros(layers, model.d_model, device=device)

    def hooks(self, tokens: Tokens) -> Iterator[tuple[Site, Callable[[Tensor], None]]]:
        """Sites and functions for one run of these prompts."""
        where = tokens.span_mask("instruction") | tokens.span_mask("suffix")
        kinds = {SiteKind.Z: self._head, SiteKind.MLP_OUT: self._mlp, SiteKind.RESID_POST: self._stream}
        if self.model.d_mlp:
            kinds[SiteKind.NEURONS] = self._neuron
        for layer in range(self.model.n_layers):
            for kind, note in kinds.items():
                yield Site(kind, layer), functools.partial(_noted, note, layer, where)

    def _sides(self, squares: Float[Tensor, "batch pos *part"], where: Bool[Tensor, "batch pos"]) -> list[Tensor]:
        """Root mean square over the chosen tokens of the harmful prompts, and of the harmless ones."""
        sides = (slice(None, self.n_harmful), slice(self.n_harmful, None))
        return [squares[side][where[side]].mean(0).sqrt() for side in sides]

    def _head(self, layer: int, z: Float[Tensor, "batch pos head d_head"], where: Bool[Tensor, "batch pos"]) -> None:
        weight = self.model.W_O(layer).float()
        gram = einsum(weight, weight, "head a d_model, head b d_model -> head a b")
        squares = einsum(z, gram, z, "batch pos head a, head a b, batch pos head b -> batch pos head").clamp(min=0)
        self.heads[:, layer] = torch.stack(self._sides(squares, where))

    def _mlp(self, layer: int, out: Float[Tensor, "batch pos d_model"], where: Bool[Tensor, "batch pos"]) -> None:
        self.mlps[:, layer] = torch.stack(self._sides(out.square().sum(-1), where))

    def _neuron(self, layer: int, own: Float[Tensor, "batch pos d_mlp"], where: Bool[Tensor, "batch pos"]) -> None:
        self.neurons[layer] = own[where].square().mean(0).sqrt()

    def _stream(self, layer: int, own: Float[Tensor, "batch pos d_model"], _: Bool[Tensor, "batch pos"]) -> None:
        last = own[:, -1]
        self.contrast[layer] = last[: self.n_harmful].mean(0) - last[self.n_harmful :].mean(0)


def _noted(note: Callable[[int, Tensor, Tensor], None], layer: int, where: Tensor, own: Tensor) -> None:
    note(layer, own.detach().float(), where)
