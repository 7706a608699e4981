"""Training of slices of a model's weights: examples, loss, AdamW on the slices alone, early stop, checkpoints."""

import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsafety.codec import read_json
from mechsafety.errors import MechsafetyError, first_line
from mechsafety.inputs import Amount, Count, check_fields
from mechsafety.models import LensModel
from mechsafety.models.backend import NormForm
from mechsafety.models.slices import Slice, in_layout_of, on_copies
from mechsafety.output import json_text, output_file
from mechsafety.progress import progress_bar
from mechsafety.prompts import Spans, Tokens
from mechsafety.replies import REPLY_TOKENS
from mechsafety.sites import Site, SiteKind

CHECKPOINT, CHECKPOINT_VERSION = "mechsafety.training", 1
# rows of a batch that is only read
READ_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class FineTuneOptions:
    """Options of `finetune_parts`.

    Attributes:
        learning_rate: Step size of AdamW, after the warm-up.
        weight_decay: AdamW's decoupled weight decay. It pulls the chosen numbers to 0, not to where they began.
        batch_size: Harmful prompts per step, and as many harmless ones.
        max_steps: Largest number of steps.
        every: Steps between two looks at the validation prompts; a checkpoint is written at each.
        patience: Looks without a new smallest validation loss after which training stops.
        warm_up: Steps in which the learning rate rises from 0.
        keep: Weight of the harmless prompts' loss.
        max_norm: Largest norm of the gradient of all chosen numbers; a larger one is scaled down.
        reply_tokens: Reply tokens that are learned, per prompt.
        judged_tokens: Length of the replies that are judged before and after.
        source: What ablated and damaged parts are held at: their mean over the harmless examples, or zero.
        control_rates: Learning rates that the control on all parameters tries, as multiples of ``learning_rate``. Many
            numbers move a model further than few do at the same rate. The training with the smallest validation loss is
            the control.
        seed: Seed of the order of examples, of refusals drawn, of random parts and of random ablations.

    Example:
        >>> ms.robustness.FineTuneOptions(max_steps=50, seed=1).max_steps
        50
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: Count = 8
    max_steps: Count = 200
    every: Count = 10
    patience: Count = 3
    warm_up: Amount = 5
    keep: float = 1.0
    max_norm: float = 1.0
    reply_tokens: Count = 24
    judged_tokens: Count = REPLY_TOKENS
    source: Literal["mean", "zero"] = "mean"
    control_rates: tuple[float, ...] = (1.0, 0.1)
    seed: Amount = 0

    def __post_init__(self) -> None:
        check_fields(self)
        rates = self.control_rates
        if not rates or not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates):
            raise MechsafetyError(f"control_rates={rates!r}", expected="at least one number, each above 0")
        for name, least in (("learning_rate", False), ("weight_decay", True), ("keep", True), ("max_norm", False)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not least):
                raise MechsafetyError(f"{name}={value!r}", expected="a number, at least 0" if least else "above 0")


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One prompt and the reply along which it is learned.

    Attributes:
        prompt: Token ids of the chat prompt.
        spans: Its spans.
        reply: Token ids of the reply.
        harmful: Which side of the loss it is on.
        state: What the reference model's final norm reads where each reply token is predicted. With it, the reference
            model's next-token distributions are learned; without it, the reply itself.
    """

    prompt: tuple[int, ...]
    spans: Spans
    reply: tuple[int, ...]
    harmful: bool
    state: Float[Tensor, "token d_model"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The reference model's final norm and unembedding, which turn stored states into its next-token distributions.

    States need d_model numbers per token, and distributions would need d_vocab.
    """

    norm: NormForm
    W_U: Tensor
    b_U: Tensor
    capped: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, model: LensModel) -> "Head":
        """Those of a model as it is now."""
        backend = model.backend
        return cls(backend.final_norm, backend.W_U.detach(), backend.b_U.detach(), backend.capped)

    def log_probabilities(self, state: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        """Log of the next-token probabilities, float32."""
        normed = self.norm.frozen(state)(state)
        return self.capped(normed @ self.W_U.float() + self.b_U.float()).log_softmax(-1)


def examples_of(
    model: LensModel, prompts: Sequence[str], replies: Sequence[Sequence[int]], *, harmful: bool, teach: bool
) -> list[Example]:
    """Examples of prompts and replies.

    Args:
        model: The model as it is now, which is the reference.
        prompts: Chat prompts.
        replies: Token ids of one reply per prompt.
        harmful: Which side of the loss they are on.
        teach: Whether the reference model's distributions are learned, instead of the replies.
    """
    plain = model.reading(())
    rows = [plain.tokenize([prompt]) for prompt in prompts]
    found = [
        Example(tuple(row.ids[0].tolist()), row.spans[0], tuple(reply), harmful)
        for row, reply in zip(rows, replies, strict=True)
    ]
    if not teach:
        return found
    site, taught = Site(SiteKind.FINAL_NORM_IN), []
    for first in range(0, len(found), READ_AT_ONCE):
        some = found[first : first + READ_AT_ONCE]
        states = plain.read(batch_of(plain, some), [site])[site]
        for example, state in zip(some, states, strict=True):
            n = len(example.reply)
            taught.append(Example(example.prompt, example.spans, example.reply, harmful, state[-n:].clone()))
    return taught


def batch_of(model: LensModel, examples: Sequence[Example]) -> Tokens:
    """Token rows of prompts and replies without the replies' last token: column -n predicts the first of n tokens."""
    rows = [[*example.prompt, *example.reply[:-1]] for example in examples]
    width = max(map(len, rows))
    ids = [[model.pad_id] * (width - len(row)) + row for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    place = model.device
    return Tokens(
        torch.tensor(ids, device=place), torch.tensor(mask, device=place), tuple(example.spans for example in examples)
    )


def loss_of(model: LensModel, head: Head, examples: Sequence[Example], keep: float) -> Float[Tensor, ""]:
    """Loss of a batch: mean over harmful examples, plus ``keep`` times the mean over harmless ones.

    Each example counts once: its loss is the mean over its reply tokens, of the cross entropy of the reply's token or
    of KL(reference || model) in nats.
    """
    longest = max(len(example.reply) for example in examples)
    logits = model.forward(batch_of(model, examples), keep=longest)
    sides: dict[bool, list[Tensor]] = {True: [], False: []}
    for row, example in zip(logits, examples, strict=True):
        own = row[-len(example.reply) :].float().log_softmax(-1)
        if example.state is None:
            said = torch.tensor(example.reply, device=own.device)
            sides[example.harmful].append(nn.functional.nll_loss(own, said))
        else:
            with torch.no_grad():
                wanted = head.log_probabilities(example.state)
            sides[example.harmful].append((wanted.exp() * (wanted - own)).sum(-1).mean())
    weights = {True: 1.0, False: keep}
    parts = [weights[side] * torch.stack(losses).mean() for side, losses in sides.items() if losses]
    return torch.stack(parts).sum()


@dataclass(slots=True)
class History:
    """How training went.

    Attributes:
        losses: Loss of each step.
        looked: Numbers of steps after which the validation loss was computed, from 0 on.
        validation: The validation losses.
        norms: Norm of each step's gradient, before it was scaled down.
    """

    losses: list[float] = field(default_factory=list)
    looked: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Which look has the smallest validation loss, the first of equal ones."""
        return min(range(len(self.validation)), key=lambda k: self.validation[k])

    def stale(self, patience: int) -> bool:
        """Whether the last looks brought no new smallest loss."""
        return len(self.validation) - 1 - self.best >= patience


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is trained on.

    Attributes:
        train, validation: Examples of both sides.
        head: Of the reference model.
        edits: Gives the context of a step, such as a random ablation, from a generator and the share of the parts that
            are ablated; without a share, that is drawn too.
        name: For the bar.
        shares: The shares under which the validation examples are read, one after the other.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    head: Head
    edits: Callable[[random.Random, float | None], AbstractContextManager[Any]]
    name: str
    shares: tuple[float | None, ...] = (None,)


def train_slices(
    model: LensModel,
    slices: Sequence[Slice],
    task: Task,
    options: FineTuneOptions,
    *,
    checkpoint: Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[dict[str, Tensor], History]:
    """Train the slices on copies of the weights, and return their numbers at the smallest validation loss.

    The gradient of a whole parameter is computed, its entries at the slice are taken, and AdamW moves a float32 copy of
    the slice alone. Its state covers nothing else. Everything random in a step depends on the seed and the step's
    number, so that a run which goes on from a checkpoint takes the same steps.

    Args:
        model: The model, which is unchanged afterwards.
        slices: What is trained.
        task: What it is trained on.
        options: Options.
        checkpoint: A file that is read if it is there, and written at every look.
        about: What the numbers depend on; a checkpoint of something else is refused.
        progress: Whether to show a bar.

    Returns:
        The slices' numbers by name, in the model's dtype, and the history.

    Raises:
        MechsafetyError: The loss is not finite, or the checkpoint is of another run.
    """
    with on_copies(model, slices) as copies, torch.enable_grad():
        leaves = [nn.Parameter(part.read(copies[part.parameter]).float()) for part in slices]
        optimizer = torch.optim.AdamW(
            leaves, lr=options.learning_rate, weight_decay=options.weight_decay, foreach=False
        )
        best, history = [leaf.detach().clone() for leaf in leaves], History()
        store = None if checkpoint is None else _Store(checkpoint, slices, about or {})
        if store is not None and checkpoint is not None and checkpoint.is_file():
            history = store.load(leaves, optimizer, best)
            _write(slices, copies, leaves)
        for copy in copies.values():
            copy.requires_grad_(True)

        def look() -> None:
            value = _validation(model, task, options)
            _check_finite(value, len(history.losses), options)
            history.looked.append(len(history.losses))
            history.validation.append(value)
            if history.best == len(history.validation) - 1:
                for kept, leaf in zip(best, leaves, strict=True):
                    kept.copy_(leaf.detach())
            if store is not None:
                store.save(leaves, optimizer, best, history)

        with progress_bar(total=options.max_steps, desc=task.name, show=progress) as bar:
            if not history.looked:
                look()
            bar.update(len(history.losses))
            while len(history.losses) < options.max_steps and not history.stale(options.patience):
                _step(model, slices, copies, leaves, optimizer, task, options, history)
                if len(history.losses) % options.every == 0 or len(history.losses) == options.max_steps:
                    look()
                bar.update()
        _write(slices, copies, best)
        return {part.name: part.read(copies[part.parameter]) for part in slices}, history


def _step(
    model: LensModel,
    slices: Sequence[Slice],
    copies: Mapping[str, nn.Parameter],
    leaves: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    task: Task,
    options: FineTuneOptions,
    history: History,
) -> None:
    """One step of AdamW on one batch."""
    number = len(history.losses)
    batch = _batch(task.train, options.batch_size, options.seed, number)
    with task.edits(random.Random(f"{options.seed} step {number}"), None):
        loss = loss_of(model, task.head, batch, options.keep)
        if loss.requires_grad:  # nothing leads from the slices to the loss if all of them are ablated
            loss.backward()
    _check_finite(float(loss.detach()), number + 1, options)
    gradients = {name: copy.grad for name, copy in copies.items()}
    for part, leaf in zip(slices, leaves, strict=True):
        copy, gradient = copies[part.parameter], gradients[part.parameter]
        if gradient is None:
            leaf.grad = torch.zeros_like(leaf)
            continue
        if gradient.stride() != copy.stride():
            gradient = gradients[part.parameter] = in_layout_of(copy, gradient)
        leaf.grad = part.read(gradient).float()
    for copy in copies.values():
        copy.grad = None
    norm = torch.nn.utils.clip_grad_norm_(leaves, options.max_norm, foreach=False)
    for group in optimizer.param_groups:
        group["lr"] = options.learning_rate * min(1.0, (number + 1) / max(1, options.warm_up))
    optimizer.step()
    _write(slices, copies, leaves)
    history.losses.append(float(loss.detach()))
    history.norms.append(float(norm))


def _check_finite(loss: float, step: int, options: FineTuneOptions) -> None:
    if not math.isfinite(loss):
        raise MechsafetyError(
            f"the loss is {loss} at step {step}",
            expected="a finite number",
            hint=f"lower learning_rate ({options.learning_rate})",
        )


def _write(slices: Sequence[Slice], copies: Mapping[str, nn.Parameter], values: Sequence[Tensor]) -> None:
    for part, new in zip(slices, values, strict=True):
        part.write(copies[part.parameter], new)


@torch.no_grad()
def _validation(model: LensModel, task: Task, options: FineTuneOptions) -> float:
    """Loss of the validation examples, the mean over the task's shares; what is ablated is the same at every look."""
    found = []
    for harmful, weight in ((True, 1.0), (False, options.keep)):
        side = [example for example in task.validation if example.harmful is harmful]
        for first, share in itertools.product(range(0, len(side), READ_AT_ONCE), task.shares):
            some = side[first : first + READ_AT_ONCE]
            with task.edits(random.Random(f"{options.seed} validation {first}"), share):
                loss = float(loss_of(model, task.head, some, 1.0))
            found.append(weight * loss * len(some) / len(side) / len(task.shares))
    return math.fsum(found)


def _batch(examples: Sequence[Example], size: int, seed: int, number: int) -> list[Example]:
    """The examples of a step: as many of either side; each side is gone through in a new order in every epoch."""
    found = []
    for harmful in (True, False):
        side = [example for example in examples if example.harmful is harmful]
        for place in range(number * size, (number + 1) * size) if side else ():
            epoch, index = divmod(place, len(side))
            found.append(side[_order(len(side), f"{seed} {harmful} {epoch}")[index]])
    return found


@lru_cache(maxsize=64)
def _order(n: int, seed: str) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return tuple(order)


class _Store:
    """A checkpoint file: slices, AdamW's state and the best slices so far; never a whole model."""

    def __init__(self, path: Path, slices: Sequence[Slice], about: Mapping[str, Any]) -> None:
        self.path, self.names = path, [part.name for part in slices]
        rows = [[part.name, part.parameter, *part.size, *part.index] for part in slices]
        self.key = hashlib.sha256(json_text([about, rows], None).encode()).hexdigest()

    def save(
        self,
        leaves: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        best: Sequence[Tensor],
        history: History,
    ) -> None:
        """Write the file, whole or not at all."""
        from safetensors.torch import save

        tensors = {}
        for name, leaf, kept in zip(self.names, leaves, best, strict=True):
            state = optimizer.state.get(leaf, {})
            zeros = torch.zeros_like(leaf)
            tensors[f"{name} now"] = leaf
            tensors[f"{name} best"] = kept
            tensors[f"{name} mean"] = state.get("exp_avg", zeros)
            tensors[f"{name} square"] = state.get("exp_avg_sq", zeros)
        row = {name: getattr(history, name) for name in ("losses", "looked", "validation", "norms")}
        about = {"format": CHECKPOINT, "version": CHECKPOINT_VERSION, "run": self.key, "history": row}
        plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        content = save(plain, {CHECKPOINT: json.dumps(about, allow_nan=False)})
        with output_file(self.path) as scratch:
            scratch.write_bytes(content)

    @torch.no_grad()
    def load(self, leaves: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, best: Sequence[Tensor]) -> History:
        """Read the file into slices and optimiser.

        Raises:
            MechsafetyError: The file is no checkpoint, or one of another run.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                about = read_json((file.metadata() or {}).get(CHECKPOINT, "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise MechsafetyError(
                f"{self.path.name} is no checkpoint ({first_line(error)})", hint="choose another checkpoint folder"
            ) from None
        if about.get("version") != CHECKPOINT_VERSION or about.get("run") != self.key:
            raise MechsafetyError(
                f"{self.path.name} is a checkpoint of another run",
                expected="one of the same model, parts, examples and options",
                hint="choose another checkpoint folder, or delete the file",
            )
        history = History(**about["history"])
        steps = float(len(history.losses))
        for name, leaf, kept in zip(self.names, leaves, best, strict=True):
            leaf.copy_(tensors[f"{name} now"])
            kept.copy_(tensors[f"{name} best"])
            if steps:
                optimizer.state[leaf] = {
                    "step": torch.tensor(steps),
                    "exp_avg": tensors[f"{name} mean"].to(leaf),
                    "exp_avg_sq": tensors[f"{name} square"].to(leaf),
                }
        return history


def checkpoint_file(folder: str | os.PathLike[str] | None, name: str) -> Path | None:
    """The checkpoint of one run in a folder."""
    return None if folder is None else Path(folder) / f"{name}.checkpoint"


def every_example(task: Task) -> Iterator[list[Any]]:
    """What the numbers of a run depend on, example by example."""
    for example in (*task.train, *task.validation):
        yield [list(example.prompt), list(example.reply), example.harmful, example.state is not None]
