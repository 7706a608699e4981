"""`LensModel`: a chat model with TransformerLens hooks, chat-template tokens and greedy generation."""

import copy
import hashlib
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.halving import in_halves
from mechsafety.inputs import Amount, Count, Prompts, prompt_list, public
from mechsafety.models.backend import Backend, use_of
from mechsafety.models.chat import ChatTokenizer
from mechsafety.models.decode import (
    Cursor,
    ReplyToken,
    Sampler,
    Speech,
    Watch,
    check_room,
    decode_replies,
    most_probable,
    reply_steps,
)
from mechsafety.models.quantised import stored_tensors
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.models.state import open_edit, open_edits
from mechsafety.models.template import checked_options
from mechsafety.nodes import NodeLike
from mechsafety.prompts import PromptPairs, Spans, TokenPairs, TokenRow, Tokens, TokenTable
from mechsafety.prompts.spans import SPANS
from mechsafety.results import Provenance, package_versions
from mechsafety.scale.work import sweeps, work
from mechsafety.settled import settled
from mechsafety.sites import Site, SiteKind

if TYPE_CHECKING:
    import mechsafety.attribution
    import mechsafety.cache

# of each row: token ids of the reply, and, where they are wanted, the next-token logits after the prompt
SaidRows = tuple[tuple[tuple[int, ...], Tensor | None], ...]


class LensModel:
    """A chat model whose activations can be read and edited by `Site`.

    `load_model` makes it and runs its checks. A prompt is a text, which is one turn of the user, or a list of chat
    messages (``[{"role": "system", "content": "..."}, {"role": "user", "content": "..."}]``) that ends in the user's
    turn. The chat template renders it. A system turn of the prompt takes the place of the model's own system text.

    Only one thread at a time runs a model, because hooks live on shared modules. A lock ensures this.

    Attributes:
        name: Name under which it was loaded.
        backend: The TransformerLens model, of either generation, behind one interface.
        tokenizer: Its tokenizer.
        template_options: Options of the chat template besides the prompt (see `load_model`).
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: Sizes; d_mlp is 0 in a mixture of experts.
        post_norm: Whether a norm stands between the heads' summed output and the residual stream (Gemma-2, OLMo-2).
            The stream then receives the norm of the heads' sum, and each head writes a share of that norm's output.
        parallel: Whether attention and MLP of a block read the same stream (GPT-NeoX).
        experts: Whether it is a mixture of experts: each MLP is one node, without neurons.
        shortcuts: The forward engine's shortcuts; at load they are set to those that are exact on this model.
        max_batch_tokens: Largest number of rows x columns in one engine batch. If it is None, memory sets the number
            (see `mechsafety.models.memory`).
        opener_ids: First tokens of a reply, after which the model is read. Empty unless `reading` made this view.
        recipe: Arguments of `load_model` that load the model again on another machine; None if it was given in memory.
        lock: A thread holds it while it runs the model. All wrappers of one TransformerLens model share one lock.

    Example:
        >>> model.n_layers, model.n_heads, model.d_mlp
        (4, 4, 30)
        >>> model.generate(harmful[:1], 8)
        ['Sorry , I can not help .']
        >>> model.cache(harmful[:1], ["z"]).z.shape  # layer, head, batch, position, d_head
        torch.Size([4, 4, 1, 10, 16])
    """

    def __init__(
        self, name: str, backend: Backend, tokenizer: Any, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.backend = backend
        self.tokenizer = tokenizer
        self.template_options = MappingProxyType(checked_options(tokenizer, template_options))
        sizes = backend.sizes
        self.n_layers = sizes.n_layers
        self.n_heads = sizes.n_heads
        self.n_kv_heads = sizes.n_kv_heads
        self.d_model = sizes.d_model
        self.d_head = sizes.d_head
        self.d_mlp = sizes.d_mlp
        self.d_vocab = sizes.d_vocab
        self.post_norm = sizes.post_norm
        self.parallel = sizes.parallel
        self.experts = sizes.experts
        self.shortcuts = Shortcuts()
        self.max_batch_tokens: int | None = None
        self.recipe: Mapping[str, Any] | None = None
        self.lock = use_of(backend.module).lock
        self.opener_ids: tuple[int, ...] = ()
        self._plain: LensModel | None = None

    def __repr__(self) -> str:
        heads = f"{self.n_heads} heads" + (f" over {self.n_kv_heads}" if self.n_kv_heads != self.n_heads else "")
        mlps = "mixture of experts" if self.experts else f"d_mlp {self.d_mlp}"
        after = f", read after {self.tokenizer.decode(list(self.opener_ids))!r}" if self.opener_ids else ""
        return f"LensModel({self.name}: {self.n_layers} layers, {heads}, {mlps}, {self.dtype_name}{after})"

    @property
    def bridge(self) -> Any:
        """TransformerLens' own object: a TransformerBridge or a HookedTransformer."""
        return self.backend.tl_model

    @property
    def hf_model(self) -> Any:
        """The torch module that holds the weights: the Hugging Face model if one runs, otherwise TransformerLens'."""
        return self.backend.module

    @property
    def device(self) -> torch.device:
        """Device of the weights; of a model on several devices, that of the embedding, where activations are read."""
        return self.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.backend.module.parameters()).dtype

    @property
    def dtype_name(self) -> str:
        """Data type of the weights without the ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    # --- tokens -------------------------------------------------------------------------------------------------

    def render(self, prompt: PromptLike) -> tuple[str, int, int]:
        """The chat prompt as text, and where in it the instruction begins and ends (characters).

        The instruction is the user's turn: of a list of messages, the last one.
        """
        return self.chat.render(prompt)

    @property
    def chat(self) -> ChatTokenizer:
        """The tokenizer, chat template and options that turn its prompts into tokens."""
        return ChatTokenizer(self.name, self.tokenizer, self.template_options, self.opener_ids)

    def reading(self, opener_ids: Sequence[int]) -> "LensModel":
        """A view of this model that is read after a reply's first tokens (its opener), not at the end of the prompt.

        The view shares weights, hooks, edits and the lock with this model. Token rows of the view end in the opener's
        tokens, which belong to the suffix. Its replies still begin where the prompt ends. If a metric has an opener,
        every analysis takes this view by itself.

        Args:
            opener_ids: The opener's tokens. Without tokens, the model as it was loaded is returned.

        Raises:
            MechsafetyError: The model's vocabulary lacks one of the tokens.
        """
        opener = tuple(int(token) for token in opener_ids)
        if opener == self.opener_ids:
            return self
        strange = [token for token in opener if not 0 <= token < self.d_vocab]
        if strange:
            raise MechsafetyError(f"an opener with the token {strange[0]}", expected=f"ids below {self.d_vocab}")
        plain = self._plain or self
        if not opener:
            return plain
        view = copy.copy(plain)
        view.opener_ids, view._plain = opener, plain
        return view

    @public
    def spans(self, prompts: Prompts) -> list[Spans]:
        """Where each chat prompt's parts lie in its token row; the model is not run."""
        return self.chat.spans(prompts)

    @public
    def tokenize(self, prompts: Prompts) -> Tokens:
        """Token rows of chat prompts, padded on the left, with spans.

        Raises:
            MechsafetyError: There are no prompts; or a prompt is empty, is no prompt, is longer than the model's
                positions, or holds a token that the model's vocabulary lacks.
        """
        if not prompts:
            raise MechsafetyError("no prompts", expected="at least one")
        rows, spans = self.chat.rows(prompts)
        for row, prompt in zip(rows, prompts, strict=True):
            self._check_known(row, prompt)
        width = max(map(len, rows))
        if width > self.backend.sizes.n_ctx:
            longest = prompts[max(range(len(rows)), key=lambda k: len(rows[k]))]
            raise MechsafetyError(
                f"a prompt of {width} tokens ({longest[:40]!r} ...)", expected=f"at most {self.backend.sizes.n_ctx}"
            )
        pad = self.pad_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=self.device)
        return Tokens(ids, mask, tuple(spans), self.opener_ids)

    @public
    def tokenize_pairs(self, pairs: PromptPairs) -> TokenPairs:
        """Aligned token rows of both sides of the pairs.

        `PromptPairs.aligned` returns only the pairs that align.

        Raises:
            MechsafetyError: A pair's chat prompts differ in length or span. The message shows both token rows and their
                first difference.
        """
        harmful, harmless = self.tokenize(pairs.harmful), self.tokenize(pairs.harmless)
        if pairs.align == "suffix":
            return TokenPairs.at_suffix(harmful, harmless)
        for index, (a, b) in enumerate(zip(harmful.spans, harmless.spans, strict=True)):
            if a != b:
                raise MechsafetyError(
                    f"pair {index + 1} of {pairs.name} does not align: {_difference(self, pairs, index)}",
                    expected="prompts with as many tokens in the instruction",
                    hint="change a word, or pair prompts with PromptPairs.matched(harmful, harmless, model.n_tokens)",
                    page="pairs-do-not-align",
                )
        return TokenPairs.of(harmful, harmless)

    def n_tokens(self, prompt: PromptLike) -> int:
        """Number of tokens of the chat prompt."""
        return len(self.chat.ids(prompt))

    def token_strings(self, prompt: PromptLike) -> list[str]:
        """The chat prompt's tokens as text, one string per token."""
        return [self.tokenizer.decode([token]) for token in self.chat.ids(prompt)]

    def explain_tokens(self, prompt: PromptLike) -> TokenTable:
        """The exact token row of a chat prompt, shown as a table of position, id, span and text."""
        tokens = self.tokenize([prompt])
        names = {k: name for name in SPANS for k in range(*tokens.spans[0].range(name))}
        ids = tokens.ids[0].tolist()
        return TokenTable(
            tuple(TokenRow(k, token, names[k], self.tokenizer.decode([token])) for k, token in enumerate(ids))
        )

    def _check_known(self, ids: Sequence[int], prompt: PromptLike) -> None:
        unknown = next((token for token in ids if token >= self.d_vocab), None)
        if unknown is not None:
            raise MechsafetyError(
                f"the token {self.tokenizer.decode([unknown])!r} of the prompt {prompt[:40]!r} has the id {unknown}",
                expected=f"ids below {self.d_vocab}, the model's tokens",
                hint="load the model with its own tokenizer, or resize_token_embeddings(len(tokenizer)) before",
            )

    # --- running ------------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(
        self, hooks: Sequence[tuple[Site, Callable[[Tensor], "Tensor | None"]]], *, by_column: bool = False
    ) -> Iterator[None]:
        """Context in which each function sees its site's activation and may return a new one in its place.

        No hook stays behind, even after an exception.

        Args:
            hooks: Sites and functions.
            by_column: A promise of the caller that each function treats every column independently of the others.
                Otherwise the engine runs all columns of a prompt in one forward, so that a function may count them.

        Raises:
            MechsafetyError: A site is in the neurons of a mixture of experts.
        """
        if any(site.kind is SiteKind.NEURONS for site, _ in hooks):
            self.check_neurons()
        counted = open_edit(self.backend.module, by_column) if hooks else nullcontext()
        with self.lock, self.backend.hooks(hooks), counted:
            yield

    @public
    def check_neurons(self, expected: str = "heads and whole MLPs") -> None:
        """Refuse single neurons in a mixture of experts, where the neurons that run differ from token to token.

        Args:
            expected: What can be given instead, for the message.

        Raises:
            MechsafetyError: The model is a mixture of experts.
        """
        if self.experts:
            raise MechsafetyError(
                f"neurons of {self.name}, a mixture of experts: the neurons that a layer runs differ from token to "
                "token",
                expected=expected,
            )

    @property
    def edited(self) -> bool:
        """Whether a hook from `hooks` is active on this model now, through any of its wrappers."""
        return bool(open_edits(self.backend.module))

    @property
    def pad_id(self) -> int:
        """Token id in padded columns, which the mask hides: the tokenizer's pad token, or 0 if the model lacks it."""
        own = self.tokenizer.pad_token_id
        return own if own is not None and own < self.d_vocab else 0

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: those that the model's files name, otherwise the tokenizer's.

        A configuration may name a token that the vocabulary lacks, as those of some architectures do by default.
        """
        own = self.tokenizer.eos_token_id
        named = [token for token in self.backend.end_ids if 0 <= token < self.d_vocab]
        return tuple(named) or (() if own is None or own >= self.d_vocab else (own,))

    @public
    def read(self, tokens: Tokens, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Run prompts once and return copies of the activations at ``sites``, detached."""
        found: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], None]:
            return lambda tensor: found.__setitem__(site, tensor.detach().clone())

        with torch.no_grad(), self.hooks([(site, keep(site)) for site in sites]):
            self.forward(tokens)
        return found

    @public
    def logits(self, prompts: Prompts | Tokens, batch_size: Count = 16) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits after each prompt, float32.

        Args:
            prompts: Requests, run ``batch_size`` at a time; or tokens, run in one batch.
            batch_size: Prompts per batch.
        """
        with torch.no_grad(), self.lock:
            if isinstance(prompts, Tokens):
                return self.forward(prompts)[:, -1].float()
            # if there are no prompts, tokenize raises the error
            batches = [list(prompts[k : k + batch_size]) for k in range(0, len(prompts) or 1, batch_size)]
            return torch.cat([in_halves(lambda batch: self._after(self.tokenize(batch)), batch) for batch in batches])

    def _after(self, tokens: Tokens) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits; the columns that all rows share are run once where that is exact."""
        from mechsafety.models.rows import lay_out, token_rows

        batch = lay_out(self, token_rows(tokens))
        if not batch.shared:
            return self.forward(tokens)[:, -1].float()
        cursor = Cursor(self.backend)
        for ids, mask in batch.pieces():
            last = cursor.feed(ids, mask)
        return last[:, -1].float()

    @public
    def forward(self, tokens: Tokens, keep: Count = 1) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of the last ``keep`` positions, padding handled by mask and position ids.

        Gradients follow the caller's grad mode.
        """
        with self.lock:
            if self.shortcuts.last_logits:
                return self.backend.logits(tokens, keep)
            return self.backend.logits(tokens, tokens.ids.shape[1])[:, -keep:]

    @sweeps
    @public
    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: Count = 64,
        batch_size: Count = 48,
        *,
        temperature: float = 0.0,
        seed: Amount = 0,
        watch: Watch | None = None,
        progress: bool = True,
    ) -> list[str]:
        """Replies to chat prompts, without special tokens; one reply per prompt, in order. By default they are greedy.

        Each step of greedy decoding takes the most probable token. The end tokens of the model's generation
        configuration end a reply. Its other options, such as a penalty or a beam, change nothing.

        Args:
            prompts: A list, or a column of pandas or numpy in the order of its rows. Each prompt is a text or a list of
                chat messages.
            max_new_tokens: Largest number of tokens in a reply.
            batch_size: Prompts per batch.
            temperature: 0 is greedy. Above 0, each token is drawn from the softmax of the logits over the temperature;
                1 samples from the model itself.
            seed: Seed of the draws. Each prompt has its own draws, so the batch size changes them only where rounding
                changes the logits.
            watch: Reads activations in the forwards of the generation, and may end a reply. A guard with monitors makes
                one.
            progress: Whether to show a bar, after two seconds.

        Raises:
            MechsafetyError: A single prompt is given, `tokenize` refuses a prompt, a reply may grow beyond the model's
                positions, or the temperature is negative or not finite.
        """
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "watch": watch, "progress": progress}
        return self.decode(self.reply_ids(prompts, max_new_tokens, batch_size, **options))

    @public
    def reply_ids(
        self,
        prompts: Prompts,
        max_new_tokens: Count = 64,
        batch_size: Count = 48,
        *,
        temperature: float = 0.0,
        seed: Amount = 0,
        watch: Watch | None = None,
        progress: bool = True,
    ) -> list[list[int]]:
        """Token ids of the replies that `generate` returns as text, each up to and including its end token."""
        sampled: dict[str, Any] = {"temperature": temperature, "seed": seed, "watch": watch}
        return self._replies(prompts, max_new_tokens, batch_size, **sampled, progress=progress)[0]

    @public
    def replies_and_logits(
        self, prompts: Prompts, max_new_tokens: Count = 64, batch_size: Count = 48, *, progress: bool = True
    ) -> tuple[list[list[int]], Float[Tensor, "prompt d_vocab"]]:
        """Greedy `reply_ids`, and the next-token logits after each prompt, which their first step has anyway.

        The logits are those of `logits`, up to rounding.
        """
        replies, first = self._replies(prompts, max_new_tokens, batch_size, with_logits=True, progress=progress)
        return replies, torch.stack(first) if first else torch.zeros(0, self.d_vocab, device=self.device)

    def _replies(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        batch_size: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        watch: Watch | None = None,
        progress: bool,
        with_logits: bool = False,
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Token ids of each reply, and, if they are wanted, the next-token logits after each prompt."""
        from mechsafety.models.rows import lay_out, prompt_rows
        from mechsafety.progress import progress_bar

        _check_temperature(temperature)
        if not prompts:
            return [], []
        rows = prompt_rows(self, prompts)
        check_room(self.backend, max(map(len, rows)), max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        replies: list[list[int]] = [[] for _ in prompts]
        logits: dict[int, Tensor] = {}
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        with progress_bar(total=len(chunks) * max_new_tokens, desc="generating", delay=2, show=progress) as bar:

            def said(chunk: list[int]) -> list[tuple[list[int], Tensor | None]]:
                with self.lock, torch.no_grad(), self._watched(watch):
                    cursor = Cursor(self.backend)

                    def read(ids: Tensor, real: Tensor) -> Tensor:
                        return cursor.feed(ids, real)[:, -1].float()

                    choose = Sampler(temperature, seed, chunk) if temperature else most_probable
                    pieces, ended = lay_out(self, [rows[k] for k in chunk]).pieces(), _ended(watch, chunk)
                    ids, steps = decode_replies(
                        read, pieces, self.end_ids, max_new_tokens, int(with_logits), bar.update, choose, ended
                    )
                # one entry per row: where memory is full, halves of a batch are joined
                return list(zip(ids, steps[0] if with_logits else [None] * len(ids), strict=True))

            # a watch keeps what it has read, so that its replies are computed where it is
            found = map(said, chunks) if watch is not None else work("replies", chunks, said, SaidRows, of=with_logits)
            for number, (chunk, new) in enumerate(zip(chunks, found, strict=True), 1):
                bar.update(number * max_new_tokens - bar.n)  # replies may end early
                for k, (ids, first) in zip(chunk, new, strict=True):
                    replies[k] = list(ids)
                    if first is not None:
                        logits[k] = first.to(self.device)
        return replies, [logits[k] for k in range(len(prompts))] if with_logits else []

    @public
    def stream(
        self,
        prompt: PromptLike,
        max_new_tokens: Count = 64,
        *,
        temperature: float = 0.0,
        seed: Amount = 0,
        watch: Watch | None = None,
    ) -> Iterator[ReplyToken]:
        """The reply to one chat prompt, token by token as it is generated.

        The tokens are those of `reply_ids` for this prompt alone, and their texts together are the reply of `generate`.
        A token's forward is run when the token is asked for. Between two tokens the model is free for other calls.

        Args:
            prompt: A text or a list of chat messages.
            max_new_tokens: Largest number of tokens in the reply.
            temperature: As for `generate`.
            seed: Seed of the draws, of which a single prompt has the first stream.
            watch: As for `generate`.

        Raises:
            MechsafetyError: As for `generate`; raised by the call itself, before the first token is asked for.

        Example:
            >>> for token in model.stream(harmful[0], 8):
            ...     print(token.text, end="")
            Sorry , I can not help .
        """
        _check_temperature(temperature)
        tokens = self.reading(()).tokenize(prompt_list([prompt]))
        check_room(self.backend, tokens.ids.shape[1], max_new_tokens)
        cursor = Cursor(self.backend)
        steps = reply_steps(
            lambda ids, real: cursor.feed(ids, real)[:, -1].float(),
            [(tokens.ids, tokens.mask)],
            self.end_ids,
            max_new_tokens,
            Sampler(temperature, seed, [0]) if temperature else most_probable,
            _ended(watch, [0]),
        )
        return self._speak(steps, max_new_tokens, watch)

    def _speak(
        self, steps: Iterator[tuple[Tensor, dict[int, int]]], max_new_tokens: int, watch: Watch | None
    ) -> Iterator[ReplyToken]:
        speech = Speech(lambda ids: self.decode([ids])[0])
        for number in range(1, max_new_tokens + 1):
            with settled(), self.lock, torch.no_grad(), self._watched(watch):
                step = next(steps, None)
            new = {} if step is None else step[1]
            if not new:
                return
            yield speech.add(new[0], new[0] in self.end_ids or number == max_new_tokens)

    def _watched(self, watch: Watch | None) -> AbstractContextManager[None]:
        """Context in which a watch reads what it asked for; it may change nothing, so that every column is alike."""
        return nullcontext() if watch is None else self.hooks(watch.hooks(), by_column=True)

    def decode(self, replies: Sequence[Sequence[int]]) -> list[str]:
        """Replies as text, without special tokens and surrounding blanks."""
        # a tokenizer that cleans up spaces would change words that a stream has said already
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(list(reply), **options).strip() for reply in replies]

    @public
    def cache(
        self, prompts: Prompts | Tokens, sites: Sequence[str] = ("resid", "z")
    ) -> "mechsafety.cache.ActivationCache":
        """Run prompts once and keep the activations at ``sites`` (see `ActivationCache`)."""
        from mechsafety.cache import ActivationCache

        return ActivationCache.run(self, prompts if isinstance(prompts, Tokens) else self.tokenize(prompts), sites)

    @public
    def attention(
        self, prompt: PromptLike, heads: NodeLike | Sequence[NodeLike]
    ) -> "mechsafety.attribution.AttentionPatterns":
        """What heads look at on one prompt, as a table and figures (see `attention_patterns`).

        Example:
            >>> figure = model.attention(harmful[0], "L0.H1").plot()
        """
        from mechsafety.attribution import attention_patterns

        return attention_patterns(self, prompt, heads)

    # --- weights ------------------------------------------------------------------------------------------------

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of a layer's heads."""
        return self.backend.W_O(layer)

    def b_O(self, layer: int) -> Float[Tensor, " d_model"]:
        """Output bias of a layer's attention; zeros where there is none."""
        return self.backend.b_O(layer)

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights of a layer's neurons."""
        self.check_neurons()
        return self.backend.W_out(layer)

    @public
    def mlp(self, layer: int, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What a layer's MLP adds when it reads ``resid``: norm, MLP and, if there is one, the norm after the MLP.

        ``resid`` is the stream after attention (before it in parallel blocks).
        """
        with self.lock:
            return self.backend.mlp(layer, resid)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding weights."""
        return self.backend.W_U if self.backend.offloaded else self._W_U  # offloaded weights are not kept

    @cached_property
    def _W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.backend.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias; zeros where there is none."""
        return self.backend.b_U

    @public
    def frozen_final_norm(
        self, resid: Float[Tensor, "*rows d_model"]
    ) -> Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows d_model"]]:
        """The final norm as a linear map (plus bias), its scale frozen at that of ``resid`` and its weight applied.

        Parts of a residual stream can be sent through the map one by one. Their images sum to the norm's output. A
        LayerNorm has a bias, which the returned function adds every time: count it only once in the sum.
        """
        return self.backend.final_norm.frozen(resid)

    @property
    def weights_sha256(self) -> str:
        """Hash of all parameters, by name, as they were when it was first asked for."""
        return (self._plain or self)._weights_sha256  # views keep none of their own

    @cached_property
    def _weights_sha256(self) -> str:
        return self.hash_weights()

    def hash_weights(self) -> str:
        """Hash of all parameters, by name, as they are now."""
        digest = hashlib.sha256()
        weights = self.backend.weights()
        for name in sorted(weights):
            parameter = weights[name]
            digest.update(name.encode())
            for tensor in stored_tensors(parameter.detach()):
                flat = torch.atleast_1d(tensor.cpu()).contiguous()  # a scalar has no last axis to view as bytes
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def identity_parts(self) -> tuple[object, ...]:
        """What tells this model from another one, as it is now (`mechsafety.scale`)."""
        template = (self.tokenizer.chat_template, dict(self.template_options), self.opener_ids)
        return (self.hash_weights(), self.dtype_name, self.device.type, template, self.shortcuts, self.max_batch_tokens)

    def provenance(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Provenance:
        """Provenance of a result computed with this model."""
        template = self.tokenizer.chat_template or ""
        opener = {"opener_ids": list(self.opener_ids)} if self.opener_ids else {}
        return Provenance(
            model=self.name,
            weights_sha256=self.weights_sha256,
            dtype=self.dtype_name,
            device=self.device.type,
            template_sha256=hashlib.sha256(str(template).encode()).hexdigest(),
            seed=seed,
            options={**(options or {}), **opener},
            versions=package_versions(),
            template_options=dict(self.template_options),
        )


def _check_temperature(temperature: object) -> None:
    if not (isinstance(temperature, numbers.Real) and 0 <= float(temperature) < math.inf):
        raise MechsafetyError(f"temperature={temperature!r}", expected="a number, at least 0")


def _ended(watch: Watch | None, numbers: Sequence[int]) -> Callable[[Collection[int]], Collection[int]]:
    """What a watch says of the rows of a batch, given the numbers of their prompts."""
    if watch is None:
        return lambda running: ()
    watch.begin(numbers)
    return lambda running: watch.ended(numbers, running)


def _difference(model: LensModel, pairs: PromptPairs, index: int) -> str:
    rows = []
    for prompt in (pairs.harmful[index], pairs.harmless[index]):
        spans = model.tokenize([prompt]).spans[0]
        rows.append(model.token_strings(prompt)[slice(*spans.instruction)])
    first = next((k for k, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
    harmful, harmless = (f"{len(row)} tokens {row}" for row in rows)
    return f"harmful {harmful}, harmless {harmless}, first difference at {first}"
