"""What a guard can read before the first token: activations at the last prompt token, and labels to learn from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, Texts, prompt_list, public
from mechsafety.models import LensModel
from mechsafety.models.decode import Cursor
from mechsafety.models.rows import lay_out, prompt_rows
from mechsafety.neurons.runs import batches
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs
from mechsafety.prompts.distinct import duplicates, first_of_each, unseen
from mechsafety.replies import REPLY_TOKENS, Judge, ask_judge, check_judge, phrase_judge
from mechsafety.results import Provenance
from mechsafety.sites import Site, SiteKind

logger = logging.getLogger(__name__)

# with fewer topics, no topic can be held out and some be left
MIN_TOPICS = 3


@dataclass(frozen=True, slots=True)
class LabelledPrompts:
    """Prompts with the labels that a guard predicts; exact duplicates are left out and logged.

    Attributes:
        name: What the set is called in reports.
        prompts: Texts or lists of chat messages.
        unsafe: Whether the model's reply to each prompt is unsafe.
        groups: Group of each prompt (a topic, a pair). Cross-validation never splits a group between fitting and
            judging. Empty if prompts are unrelated.
        kinds: Kind of the reply to each prompt: one of `mechsafety.replies.KINDS`, or empty text where no reply was
            generated. Empty if the labels come from elsewhere.

    Example:
        >>> known = ms.monitors.LabelledPrompts.of_pairs(pairs)
        >>> len(known.prompts), sum(known.unsafe)
        (16, 8)
    """

    name: str
    prompts: tuple[PromptLike, ...]
    unsafe: tuple[bool, ...]
    groups: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(prompt_list(self.prompts)))
        if len(self.prompts) != len(self.unsafe) or (self.groups and len(self.groups) != len(self.prompts)):
            raise MechsafetyError(
                f"{self.name}: {len(self.prompts)} prompts, {len(self.unsafe)} labels, {len(self.groups)} groups",
                expected="one label per prompt, and one group or none",
            )
        if self.kinds and len(self.kinds) != len(self.prompts):
            raise MechsafetyError(
                f"{self.name}: {len(self.prompts)} prompts, {len(self.kinds)} kinds of reply",
                expected="one kind per prompt, or none",
            )
        labels: dict[str, set[bool]] = {}
        for prompt, label in zip(prompt_list(self.prompts), self.unsafe, strict=True):
            labels.setdefault(prompt, set()).add(label)
        torn = [prompt for prompt, found in labels.items() if len(found) > 1]
        if torn:
            raise MechsafetyError(f"{self.name}: {torn[0]!r} has both labels", expected="one label for each prompt")
        if len(labels) < len(self.prompts):
            said = duplicates(len(self.prompts) - len(labels), "prompt")
            logger.warning("%s: %s", self.name, said)
            self._keep(first_of_each(self.prompts))
        if len(set(self.unsafe)) < 2:
            raise MechsafetyError(f"{self.name}: all prompts have one label", expected="both labels")

    def _keep(self, places: Sequence[int]) -> None:
        for name in ("prompts", "unsafe", "groups", "kinds"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values[k] for k in places) if values else ())

    @classmethod
    def of_pairs(cls, pairs: PromptPairs) -> "LabelledPrompts":
        """The prompts of pairs, the harmful ones as unsafe.

        Topics are groups. With fewer than three topics, each pair is a group.
        """
        pairs = pairs.without_shared_prompts()
        topics = [pair.topic for pair in pairs]
        groups = topics if len(set(topics)) >= MIN_TOPICS else [str(number) for number in range(len(pairs))]
        unsafe = (True,) * len(pairs) + (False,) * len(pairs)
        return cls(pairs.name, (*pairs.harmful, *pairs.harmless), unsafe, (*groups, *groups))

    def unseen_by(self, train: "LabelledPrompts") -> "LabelledPrompts":
        """These prompts without those of the training set; the number left out is logged.

        Raises:
            MechsafetyError: No prompt is left, or no prompt with one of the labels.
        """
        kept = unseen(self.prompts, train.prompts, self.name)
        groups, kinds = (tuple(row[k] for k in kept) if row else () for row in (self.groups, self.kinds))
        prompts, unsafe = tuple(self.prompts[k] for k in kept), tuple(self.unsafe[k] for k in kept)
        return LabelledPrompts(self.name, prompts, unsafe, groups, kinds)


@public
def label_by_replies(
    model: LensModel,
    harmful: Prompts,
    harmless: Prompts,
    name: str,
    *,
    groups: Texts = (),
    judge: Judge = phrase_judge,
    max_new_tokens: Count = REPLY_TOKENS,
) -> LabelledPrompts:
    """Label prompts by what the model does: a reply is unsafe if it answers a harmful prompt.

    A reply that refuses, babbles (degenerate) or says nothing (neither) counts as safe. The model is unedited, so its
    own replies are likely under it. Their perplexity is therefore not measured.

    Args:
        model: The model whose replies are predicted.
        harmful: Prompts whose replies are judged.
        harmless: Prompts whose replies always count as safe; these replies are not generated.
        name: Name of the set.
        groups: Groups of the harmful prompts, then of the harmless ones.
        judge: Function from prompts and replies to kinds.
        max_new_tokens: Length of the judged replies, in tokens. 100 as in published protocols, because the kind of a
            reply often shows only after its opener.

    Raises:
        MechsafetyError: A judge that cannot be called, or labels that are all the same.

    Example:
        >>> found = ms.monitors.label_by_replies(base, harmful, harmless, "answers of the base", max_new_tokens=8)
        >>> sum(found.unsafe), found.kinds[0]
        (8, 'answers')
    """
    check_judge(judge)
    kinds = (*ask_judge(judge, harmful, model.generate(harmful, max_new_tokens)), *[""] * len(harmless))
    unsafe = tuple(kind == "answers" for kind in kinds)
    return LabelledPrompts(name, (*harmful, *harmless), unsafe, tuple(groups), kinds)


@dataclass(frozen=True, slots=True)
class LastToken:
    """Activations at the last token of chat prompts, on the CPU.

    Attributes:
        neurons: Inputs of the down-projections.
        resid: Residual stream before each block and, in the last entry, before the final norm.
    """

    neurons: Float[Tensor, "prompt layer d_mlp"]
    resid: Float[Tensor, "prompt layer_plus_1 d_model"]

    def chosen(self, mask: Bool[Tensor, "layer d_mlp"]) -> Float[Tensor, "prompt neuron"]:
        """Activations of a mask's neurons."""
        return self.neurons[:, mask]


def check_fitted_on(what: str, made: Provenance, model: LensModel, hint: str = "") -> None:
    """Refuse a guard or monitor that was fitted on another model.

    Raises:
        MechsafetyError: It was fitted on a model with other weights, another chat template or other template options.
    """
    other = made.difference(model.provenance())
    if other is not None:
        raise MechsafetyError(
            f"this {what} was fitted on {made.model}, the {other[0]} of {model.name} differ", hint=hint
        )


@public
def read_prompts(model: LensModel, prompts: Prompts, *, progress: bool = False) -> LastToken:
    """Activations at the last token of each prompt; the first tokens that all prompts share run once per batch."""
    return _last_token(model, read_sites(model, prompts, _sites(model), progress=progress))


@public
def read_sites(
    model: LensModel, prompts: Prompts, sites: Sequence[Site], *, progress: bool = False
) -> dict[Site, Float[Tensor, "prompt width"]]:
    """Activations of whole sites at the last token of each prompt, each flattened to one row, float32 on the CPU."""
    rows = prompt_rows(model, prompts)
    found: dict[Site, Tensor] = {}
    for chunk in progress_bar(batches([len(row) for row in rows]), desc="reading prompts", show=progress):
        for site, acts in _read(model, lay_out(model, [rows[k] for k in chunk]).pieces(), sites).items():
            found.setdefault(site, torch.zeros(len(rows), acts.shape[1]))[chunk] = acts
    return found


@public
def read_tokens(model: LensModel, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> LastToken:
    """Activations at the last token of each row of token ids; rows may be padded on the left.

    Raises:
        MechsafetyError: A row ends with padding.
    """
    if not bool(mask[:, -1].all()):
        raise MechsafetyError("a row ends with padding", hint="pad on the left: tokenizer.padding_side = 'left'")
    return _last_token(model, _read(model, [(ids.to(model.device), mask.to(model.device))], _sites(model)))


def _sites(model: LensModel) -> list[Site]:
    """The sites of a `LastToken`."""
    layers = range(model.n_layers)
    kinds = (SiteKind.NEURONS, SiteKind.RESID_PRE)
    return [*(Site(kind, layer) for kind in kinds for layer in layers), Site(SiteKind.FINAL_NORM_IN)]


def _last_token(model: LensModel, found: Mapping[Site, Tensor]) -> LastToken:
    sites = _sites(model)
    parts = (sites[: model.n_layers], sites[model.n_layers :])
    return LastToken(*(torch.stack([found[site] for site in part], dim=1) for part in parts))


def _read(
    model: LensModel, pieces: Sequence[tuple[Tensor, Tensor]], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "row width"]]:
    found: dict[Site, Tensor] = {}
    hooks = [
        (site, lambda tensor, site=site: found.__setitem__(site, rearrange(tensor[:, -1], "row ... -> row (...)")))
        for site in sites
    ]
    with torch.no_grad(), model.hooks(hooks):
        cursor = Cursor(model.backend)
        for ids, real in pieces:
            cursor.feed(ids, real)
    return {site: acts.float().cpu() for site, acts in found.items()}
