"""Writes a planned circuit into a model's weights; every gain is set by a measurement."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor, nn

from mechsafety.models.template import render
from mechsafety.nodes import Node
from mechsafety.prompts import PromptPairs
from mechsafety.testbed.plan import Plan, PlantedPart, Write
from mechsafety.testbed.vocabulary import COMPLIANCE, MARKERS, QUALIFIERS, REFUSAL, TOPICS, reply_successors
from mechsafety.testbed.weights import BlockWeights, Weights, weights_of

# lengths of the planted vectors in the residual stream
CONSTANT, FEATURE, DECOY = 6.0, 2.0, 3.0
# attention score of the token that a head looks for, and of the start token, to which the head falls back
FOUND, FALLBACK = 16.0, 8.0
# a neuron's input where it fires and where it does not
ON, OFF = 4.0, -3.0
# logits of the two replies' first words, and of every later word after the one before it
REFUSE, COMPLY, CONTINUE = 12.0, 6.0, 20.0
# number of pairs on which gains are measured
PROBED = 10


def plateau(activation: nn.Module, growth: float = 1.0, *, gated: bool = False) -> float:
    """The a > 0 at which a neuron gives the same output for the input -2a as for the input -a.

    Two writers together give the neuron the input -2a, one writer gives -a. The activation function has its minimum
    between the two. At the input 0, from no writer, its output is 0.

    Args:
        activation: SiLU or GELU.
        growth: Factor by which all other inputs grow where one writer is silent, because the norm's scale is smaller.
        gated: Whether the output is multiplied by a gate that grows by the same factor.
    """

    def difference(a: float) -> float:
        one, both = activation(torch.tensor([-a * growth, -2 * a], dtype=torch.float64)).tolist()
        apart: float = (growth if gated else 1.0) * one - both
        return apart

    return float(brentq(difference, 0.1, 2.0))


def write_plan(model: Any, tokenizer: Any, pairs: PromptPairs, plan: Plan, generator: torch.Generator) -> None:
    """Write every part of a plan into a model that is filled with noise; all other weights stay noise.

    Args:
        model: A model from `mechsafety.testbed.weights`.
        tokenizer: The model's tokenizer.
        pairs: Prompts on which gains are measured.
        plan: The parts and their places.
        generator: Generator of directions and thresholds.
    """
    with torch.no_grad():
        _Planter(model, tokenizer, pairs, generator, plan).plant()


class _Planter:
    """Writes a plan into a model, block by block; all other weights stay noise.

    Gains are set by measurement. Each block is written after all earlier blocks. A forward pass then shows what the
    block reads.
    """

    def __init__(self, model: Any, tokenizer: Any, pairs: PromptPairs, generator: torch.Generator, plan: Plan) -> None:
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.weights: Weights = weights_of(model)
        self.generator = generator
        names = list(plan.directions)
        names += [f"word {word}" for word in reply_successors()]
        names += [f"decoy {part.number}" for part in plan.parts if part.role == "decoy"]
        self.along = self._directions(names)
        self._reserve()
        self._embed()
        probed = pairs.sample(PROBED, 0)
        self.harmful, self.harmless = self._rows(probed.harmful), self._rows(probed.harmless)
        self.columns = self._columns(self.harmful)

    def plant(self) -> None:
        """Write every part, then the unembedding."""
        for layer, block in enumerate(self.weights.layers):
            if self.plan.heads_of(layer):
                self._heads(block, layer)
            if self.plan.neurons_of(layer):
                self._neurons(block, layer)
        self._unembed()

    def _directions(self, names: Sequence[str]) -> Mapping[str, Float[Tensor, " d_model"]]:
        """Orthonormal directions, all orthogonal to the vector of ones, which LayerNorm removes."""
        d_model = self.weights.embed.shape[1]
        random_rows = torch.randn(d_model, len(names) + 1, generator=self.generator, dtype=torch.float64)
        random_rows[:, 0] = 1.0
        basis = torch.linalg.qr(random_rows).Q[:, 1:].float()
        return {name: basis[:, k] for k, name in enumerate(names)}

    def _id(self, word: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(word))

    def _reserve(self) -> None:
        """Take the decoys' directions out of all written noise, which would make a decoy's two signs unequally long."""
        decoys = [direction for name, direction in self.along.items() if name.startswith("decoy")]
        if not decoys:
            return
        rows = torch.stack(decoys)
        written = [self.weights.embed, *self.weights.biases]
        for block in self.weights.layers:
            written += [block.o, block.write]
        for tensor in written:
            tensor -= (tensor @ rows.T) @ rows

    def _embed(self) -> None:
        embed = self.weights.embed
        embed += CONSTANT * self.along["constant"]
        for name, word in MARKERS.items():
            if name in self.along:
                embed[self._id(word)] += FEATURE * self.along[name]
        # where a decoy neuron fires, it adds twice this with the other sign, so that the length stays the same
        shift = sum(
            DECOY * self.along[f"decoy {part.number}"]
            for part in self.plan.parts
            if part.role == "decoy" and part.node.kind == "neuron"
        )
        for word_pairs in TOPICS.values():
            for words in word_pairs:
                for word, name in zip(words, ("harm", "benign"), strict=True):
                    embed[self._id(word)] += FEATURE * (self.along["topic"] + self.along[name]) - shift
        if self.plan.two_words:
            for words in QUALIFIERS:
                for word, name in zip(words, ("harm too", "benign too"), strict=True):
                    embed[self._id(word)] += FEATURE * (self.along["qualifier"] + self.along[name])
        for word in reply_successors():
            embed[self._id(word)] += FEATURE * self.along[f"word {word}"]

    def _rows(self, prompts: Sequence[str], reply: Sequence[str] = ()) -> Int[Tensor, "prompt pos"]:
        """Token ids, padded on the right; no earlier position sees the padding."""
        texts = [render(self.tokenizer, prompt, {})[0] for prompt in prompts]
        rows = [self.tokenizer(" ".join([text, *reply]), add_special_tokens=False).input_ids for text in texts]
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def _columns(self, ids: Int[Tensor, "prompt pos"]) -> Mapping[str, Int[Tensor, " prompt"]]:
        """Column of each prompt's start token, harmful words, and tokens that mark a position."""
        topic = [bad for word_pairs in TOPICS.values() for bad, _ in word_pairs]
        words = {"topic": topic, "qualifier": [bad for bad, _ in QUALIFIERS]}
        words |= {name: [word] for name, word in MARKERS.items()}
        wanted = {name: some for name, some in words.items() if name in self.along}
        return {
            name: torch.isin(ids, torch.tensor([self._id(word) for word in some])).long().argmax(1)
            for name, some in wanted.items()
        }

    def _seen(self, norm: nn.Module) -> Mapping[str, Float[Tensor, "prompt d_model"]]:
        """Current output of a norm, by side and named column (``harmful end``)."""
        out = _output_of(self.model, torch.cat([self.harmful, self.harmless]), norm)
        each = torch.arange(len(self.harmful))
        return {
            f"{side} {place}": values[each, columns]
            for side, values in zip(("harmful", "harmless"), out.chunk(2), strict=True)
            for place, columns in self.columns.items()
        }

    def _reader(self, norm: nn.Module, name: str) -> Float[Tensor, " d_model"]:
        """The vector whose product with a norm's output is the stream's part along a direction, over its scale."""
        weight: Any = norm.weight
        vector: Tensor = self.along[name] / weight.data
        return vector

    def _heads(self, block: BlockWeights, layer: int) -> None:
        norm = block.norms[0]
        at = self._seen(norm)
        n_heads, d_head = block.q.shape[:2]
        # both halves of the slowest pair of rotary dimensions, then of the next slowest
        dims = {name: d_head // (2 - k % 2) - 1 - k // 2 for k, name in enumerate(self.plan.keys)}
        groups: dict[int, list[int]] = {}
        for head in self.plan.heads_of(layer):
            groups.setdefault(head * block.k.shape[0] // n_heads, []).append(head)
        for group, members in groups.items():
            for name, dim in dims.items():
                block.k[group, dim] = self._reader(norm, name)
            # one channel per value, along random orthonormal vectors of the heads' own space, free of noise
            mixed = torch.randn(d_head, d_head, generator=self.generator)
            channels = torch.linalg.qr(mixed).Q[:, : len(self.plan.values)]
            block.v[group] -= channels @ (channels.T @ block.v[group])
            block.v[group] += channels @ torch.stack([self._reader(norm, name) for name in self.plan.values])
            for head in members:
                block.o[head] -= channels @ (channels.T @ block.o[head])
                self._head(block, self.plan.part(Node("head", layer, head)), at, dims, channels)

    def _head(
        self,
        block: BlockWeights,
        part: PlantedPart,
        at: Mapping[str, Tensor],
        dims: Mapping[str, int],
        channels: Float[Tensor, "d_head value"],
    ) -> None:
        """One head's queries and outputs."""
        norm, head, work = block.norms[0], part.node.index or 0, part.work

        def mean(side: str, place: str, name: str) -> float:
            return float((at[f"{side} {place}"] @ self._reader(norm, name)).mean())

        def look(target: str, asked: str, score: float) -> None:
            gain = score * block.q.shape[1] ** 0.5 / mean("harmful", target, target) / mean("harmful", work.at, asked)
            block.q[head, dims[target]] = gain * self._reader(norm, asked)

        look(work.looks_at, work.asks or work.at, FOUND)
        if work.falls_back:
            look("start", "constant", FALLBACK)
        for write in work.writes:
            gain = write.sign * part.length * _length(part) / mean(write.side, work.looks_at, write.read)
            channel = channels[:, self.plan.values.index(write.read)]
            block.o[head] += gain * torch.outer(channel, self.along[_written(part, write)])

    def _neurons(self, block: BlockWeights, layer: int) -> None:
        norm = block.norms[1]
        at = self._seen(norm)
        constant = self._reader(norm, "constant")
        for neuron in self.plan.neurons_of(layer):
            part = self.plan.part(Node("neuron", layer, neuron))
            place, writes = part.work.at, part.work.writes
            reader = torch.stack([self._reader(norm, write.read) for write in writes]).sum(0)
            # gain and offset that give the wanted inputs with the feature and without it
            system = [
                [float((at[f"{side} {place}"] @ vector).mean()) for vector in (reader, constant)]
                for side in ("harmful", "harmless")
            ]
            jitter = torch.rand(2, generator=self.generator, dtype=torch.float64) - 0.5
            wanted = torch.tensor([ON, OFF], dtype=torch.float64) + jitter
            if part.doubled:
                # a feature with the share s of the squared length has s / 4 left when it is halved
                share = system[0][0] ** 2 / len(reader)
                growth = (1 - 0.75 * share) ** -0.5
                a = plateau(self.weights.activation, growth, gated=block.gate is not None)
                wanted = torch.tensor([-2 * a, 0.0], dtype=torch.float64)
            gain, offset = torch.linalg.solve(torch.tensor(system, dtype=torch.float64), wanted).tolist()
            block.read[neuron] = gain * reader + offset * constant
            self._clear_bias(layer, neuron)
            if block.gate is not None:
                block.gate[neuron] = constant / system[0][1]
            value = float(self.weights.activation(wanted)[0])
            block.write[neuron] *= 0.2
            block.write[neuron] += part.length * _length(part) / value * self.along[_written(part, writes[0])]

    def _clear_bias(self, layer: int, neuron: int) -> None:
        if hasattr(self.model, "transformer"):
            self.model.transformer.h[layer].mlp.c_fc.bias.data[neuron] = 0.0

    def _unembed(self) -> None:
        norm, unembed = self.weights.final_norm, self.weights.unembed
        at = self._seen(norm)
        for word, name, side, logit in (
            (REFUSAL[0], "refuse", "harmful", REFUSE),
            (COMPLIANCE[0], "assistant", "harmless", COMPLY),
        ):
            reader = self._reader(norm, name)
            unembed[self._id(word)] += logit / float((at[f"{side} assistant"] @ reader).mean()) * reader
        # each word of a reply predicts the next; one scale fits all words, because their embeddings are equally long
        last = self._rows(["tell me about cakes please"], [COMPLIANCE[0]])
        value = float(_output_of(self.model, last, norm)[0, -1] @ self._reader(norm, f"word {COMPLIANCE[0]}"))
        for word, following in reply_successors().items():
            unembed[self._id(following)] += CONTINUE / value * self._reader(norm, f"word {word}")


def _length(part: PlantedPart) -> float:
    """Length of what a part's group writes."""
    return DECOY if part.role == "decoy" else FEATURE


def _written(part: PlantedPart, write: Write) -> str:
    """The direction that a part writes; every decoy has its own."""
    return f"{write.written} {part.number}" if part.role == "decoy" else write.written


def _output_of(model: Any, ids: Int[Tensor, "row pos"], module: nn.Module) -> Float[Tensor, "row pos d_model"]:
    """Output of a module of the model on these rows."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
