"""Dynamic activation patching: a base model that speaks with an aligned model's neurons."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.conversation import Conversation
from mechsafety.inputs import Count, Prompts, prompt_list, public
from mechsafety.models import LensModel
from mechsafety.models.lens_model import SaidRows
from mechsafety.models.rows import lay_out, prompt_rows
from mechsafety.neurons.behaviour import Unedited
from mechsafety.neurons.masks import neuron_mask
from mechsafety.neurons.runs import batches, check_pair, greedy
from mechsafety.neurons.scores import digest
from mechsafety.nodes import NodeLike
from mechsafety.replies import REPLY_TOKENS, Judge, ReplyKinds, ask_judge, check_judge, phrase_judge
from mechsafety.results import Provenance, Result, prompt_column
from mechsafety.scale.work import sweeps, work


@dataclass(frozen=True, slots=True, repr=False)
class PatchedReplies(Result):
    """Greedy replies of a base model with some neurons taken from an aligned model.

    Attributes:
        provenance: The base model, options, versions.
        aligned: The aligned model.
        neurons: Mask of the neurons taken.
        prompts, replies: The prompts and their replies, in order. Replies are without special tokens.
        tokens: Token ids of each reply, including its end token.
        logits: Next-token logits after each prompt, under patching.
        judged: Kind of each reply, and its loss under the unedited models (the smaller of the two). None without a
            judge, and in results saved by earlier versions.

    Example:
        >>> patched = ms.neurons.dynamic_patching(base, model, made.truth.neurons, harmful[:1], max_new_tokens=8)
        >>> patched.replies
        ('Sorry , I can not help .',)
    """

    provenance: Provenance
    aligned: Provenance
    neurons: Bool[Tensor, "layer d_mlp"]
    prompts: tuple[str | Conversation, ...]
    replies: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    logits: Float[Tensor, "prompt d_vocab"]
    judged: ReplyKinds | None = None

    def __repr__(self) -> str:
        size = f"{len(self.replies)} prompts, {int(self.neurons.sum())} of {self.neurons.numel()} neurons"
        if self.judged is None:
            return f"PatchedReplies({size}; not judged)"
        refused, babble = self.judged.share("refuses"), self.judged.share("degenerate")
        said = f"refused {refused:.0%}, degenerate {babble:.0%}, perplexity {self.judged.perplexity:.3g}"
        return f"PatchedReplies({size}; {said})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt: reply, kind and perplexity; without a judge, kind is None and perplexity NaN."""
        n = len(self.prompts)
        kinds = [None] * n if self.judged is None else list(self.judged.kinds)
        perplexity = [float("nan")] * n if self.judged is None else self.judged.loss.exp().tolist()
        return pd.DataFrame(
            {"prompt": prompt_column(self.prompts), "reply": self.replies, "kind": kinds, "perplexity": perplexity}
        )

    def plot(self) -> go.Figure:
        """Bar chart of the lengths of the replies, one colour per kind."""
        import plotly.express as px

        frame = self.to_dataframe().assign(length=[len(ids) for ids in self.tokens])
        frame["kind"] = frame.kind.fillna("not judged")
        return px.histogram(frame, x="length", color="kind", labels={"length": "tokens in the reply"})


@sweeps
@public
def dynamic_patching(
    base: LensModel,
    aligned: LensModel,
    neurons: Tensor | Sequence[NodeLike],
    prompts: Prompts,
    *,
    max_new_tokens: Count = REPLY_TOKENS,
    judge: Judge | None = phrase_judge,
    limit: float | None = None,
    batch_size: Count = 16,
    progress: bool = True,
) -> PatchedReplies:
    """Generate greedily from ``base`` with chosen neurons set to the aligned model's (Chen et al. 2024, Algorithm 1).

    Each step of generation is:

    1. The aligned model reads the tokens so far, unpatched and with its own key-value cache.
    2. The base model reads them too. Its chosen neurons take the aligned model's values at every position that the step
       computes.
    3. The base model's most probable token is appended for both models.

    With no neurons, this is the base model. With all neurons, it is the aligned model if the two differ only in their
    MLPs.

    Args:
        base: The model that speaks.
        aligned: The model whose neurons are taken.
        neurons: Boolean mask [layer d_mlp] (``NeuronScores.top``), or neuron nodes.
        prompts: Chat prompts, rendered by the base model's template for both models.
        max_new_tokens: Largest length of a reply, in tokens. 100 as in published protocols, because the kind of a reply
            often shows only after its opener.
        judge: Function of prompts and replies that gives the kind of each reply. None: nothing is judged, and only the
            replies are generated.
        limit: Loss per token above which a reply is degenerate, in nats. By default the larger
            `mechsafety.replies.loss_limit` of the two models, for which each of them answers some ordinary prompts.
        batch_size: Number of prompts in one batch. Replies do not depend on it, except where rounding breaks a tie.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Models that are not a pair, neurons that they do not have, or a judge that cannot be called.

    Example:
        >>> base.generate(harmful[:1], 8)
        ['Sure ! here is how .']
        >>> ms.neurons.dynamic_patching(base, model, made.truth.neurons, harmful[:1], max_new_tokens=8).replies
        ('Sorry , I can not help .',)
    """
    from mechsafety.progress import progress_bar

    check_pair(base, aligned)
    if judge is not None:
        check_judge(judge)
    mask = neuron_mask(base, neurons)
    rows = prompt_rows(base, prompts)
    tokens: list[tuple[int, ...]] = [()] * len(rows)
    logits = torch.empty(len(rows), base.d_vocab)
    donor = aligned if bool(mask.any()) else None
    chunks = batches([len(row) for row in rows], batch_size)

    def spoken(chunk: list[int]) -> list[tuple[list[int], Tensor]]:
        said, steps = greedy(base, donor, mask, lay_out(base, [rows[k] for k in chunk]), max_new_tokens)
        # one entry per row: where memory is full, halves of a batch are joined
        return list(zip(said, steps[:, 0].cpu(), strict=True))

    found = zip(chunks, work("patched replies", chunks, spoken, SaidRows), strict=True)
    show = progress and len(chunks) > 1
    for chunk, said in progress_bar(found, total=len(chunks), desc="patched replies", show=show):
        for k, (reply, first) in zip(chunk, said, strict=True):
            tokens[k], logits[k] = tuple(reply), first
    replies = base.decode(tokens)
    judged = None
    if judge is not None:
        judged = Unedited.of(base, aligned, limit=limit).kinds(prompts, replies, ask_judge(judge, prompts, replies))
    options = {"neurons": int(mask.sum()), "max_new_tokens": max_new_tokens, "prompts_sha256": digest(prompts)}
    return PatchedReplies(
        base.provenance(options=options),
        aligned.provenance(),
        mask,
        tuple(prompt_list(prompts)),
        tuple(replies),
        tuple(tokens),
        logits,
        judged,
    )
