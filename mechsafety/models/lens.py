"""`LensModel`: a chat model with TransformerLens hooks, chat-template tokens and greedy generation."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.prompts import PromptPairs, Spans, TokenPairs, TokenRow, Tokens, TokenTable
from mechsafety.prompts.spans import SPANS
from mechsafety.results import Provenance, package_versions
from mechsafety.sites import Site, hook_name

if TYPE_CHECKING:
    import mechsafety.cache

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATE_DATE = "26 Jul 2024"
# a marker that no template adds by itself, to find where the instruction stands in the rendered text
_MARK = "\u2042instruction\u2042"


class LensModel:
    """A chat model whose activations can be read and edited by `Site`.

    Made by `load_model`, which also runs the checks. Prompts are strings: each is one user turn, rendered by the chat
    template. One thread at a time runs a model (hooks live on shared modules); a lock sees to it.

    Attributes:
        name: What it was loaded as.
        bridge: The TransformerLens bridge.
        tokenizer: Its tokenizer.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: Sizes.
        post_norm: Whether a norm stands between the heads' summed output and the residual stream (Gemma-2, OLMo-2);
            found at load. Head outputs then do not sum to the residual stream.
        parallel: Whether attention and MLP of a block read the same stream (GPT-NeoX).
    """

    def __init__(self, name: str, bridge: Any, tokenizer: Any) -> None:
        self.name = name
        self.bridge = bridge
        self.tokenizer = tokenizer
        cfg = bridge.cfg
        self.n_layers: int = cfg.n_layers
        self.n_heads: int = cfg.n_heads
        self.n_kv_heads: int = cfg.n_key_value_heads or cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_head: int = cfg.d_head
        self.d_mlp: int = cfg.d_mlp
        self.d_vocab: int = cfg.d_vocab
        self.post_norm = False
        self.parallel = bool(cfg.parallel_attn_mlp)
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        heads = f"{self.n_heads} heads" + (f" over {self.n_kv_heads}" if self.n_kv_heads != self.n_heads else "")
        return f"LensModel({self.name}: {self.n_layers} layers, {heads}, d_mlp {self.d_mlp}, {self.dtype_name})"

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model underneath (its blocks are the bridge's)."""
        return self.bridge.original_model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.hf_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.hf_model.parameters()).dtype

    @property
    def dtype_name(self) -> str:
        """Data type of the weights without the ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    # --- tokens -------------------------------------------------------------------------------------------------

    def render(self, prompt: str) -> tuple[str, int, int]:
        """The chat prompt as text, and where in it the instruction begins and ends (characters)."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise MechsafetyError("an empty prompt", expected="text")
        text = self._template(prompt)
        start = self._template(_MARK).find(_MARK)
        content = prompt if text.startswith(prompt, start) else prompt.strip()
        if start < 0 or not text.startswith(content, start):
            raise MechsafetyError("the chat template rewrites the instruction", expected="a template that quotes it")
        return text, start, start + len(content)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Token rows of chat prompts, padded on the left, with spans.

        Raises:
            MechsafetyError: No prompts, a single string, or an empty prompt.
        """
        if isinstance(prompts, str):
            raise MechsafetyError("a single string was given", expected="a list of prompts", cure="write [prompt]")
        if not prompts:
            raise MechsafetyError("no prompts", expected="at least one")
        rows, spans = [], []
        for prompt in prompts:
            text, start, end = self.render(prompt)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            inside = [k for k, (a, b) in enumerate(encoded["offset_mapping"]) if b > a and max(a, start) < min(b, end)]
            if not inside:
                raise MechsafetyError(f"the tokenizer gives no token to the prompt {prompt!r}")
            rows.append(encoded["input_ids"])
            spans.append(Spans((inside[0], inside[-1] + 1), len(rows[-1])))
        width = max(map(len, rows))
        if width > self.bridge.cfg.n_ctx:
            longest = prompts[max(range(len(rows)), key=lambda k: len(rows[k]))]
            raise MechsafetyError(
                f"a prompt of {width} tokens ({longest[:40]!r} ...)", expected=f"at most {self.bridge.cfg.n_ctx}"
            )
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=self.device)
        return Tokens(ids, mask, tuple(spans))

    def tokenize_pairs(self, pairs: PromptPairs) -> TokenPairs:
        """Aligned token rows of both sides of the pairs.

        Raises:
            MechsafetyError: A pair's chat prompts differ in length or span; both token rows and the first difference
                are in the message.
        """
        harmful, harmless = self.tokenize(pairs.harmful), self.tokenize(pairs.harmless)
        for index, (a, b) in enumerate(zip(harmful.spans, harmless.spans, strict=True)):
            if a != b:
                raise MechsafetyError(
                    f"pair {index + 1} of {pairs.name} does not align: {_difference(self, pairs, index)}",
                    expected="twins with as many tokens in the instruction",
                    cure="change a word, or pair prompts with PromptPairs.matched(harmful, harmless, model.n_tokens)",
                )
        return TokenPairs.of(harmful, harmless)

    def n_tokens(self, prompt: str) -> int:
        """Number of tokens of the chat prompt."""
        return len(self.tokenizer(self.render(prompt)[0], add_special_tokens=False)["input_ids"])

    def token_strings(self, prompt: str) -> list[str]:
        """The chat prompt's tokens as text, one string a token."""
        ids = self.tokenizer(self.render(prompt)[0], add_special_tokens=False)["input_ids"]
        return [self.tokenizer.decode([token]) for token in ids]

    def explain_tokens(self, prompt: str) -> TokenTable:
        """The exact token row of a chat prompt; shows itself as a table of position, id, span and text."""
        tokens = self.tokenize([prompt])
        names = {k: name for name in SPANS for k in range(*tokens.spans[0].range(name))}
        ids = tokens.ids[0].tolist()
        return TokenTable(
            tuple(TokenRow(k, token, names[k], self.tokenizer.decode([token])) for k, token in enumerate(ids))
        )

    def _template(self, content: str) -> str:
        # some templates write today's date: a fixed one, or the same seed would give other numbers tomorrow
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
            date_string=TEMPLATE_DATE,
            strftime_now=lambda form: TEMPLATE_DATE,
        )

    # --- running ------------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(self, hooks: Sequence[tuple[Site, Callable[[Tensor], "Tensor | None"]]]) -> Iterator[None]:
        """Context in which each function sees its site's activation and may return a new one in its place.

        No hook is left behind, also after an exception.
        """

        def adapt(function: Callable[[Tensor], "Tensor | None"]) -> Callable[..., Any]:
            return lambda tensor, hook: function(tensor)

        with self.lock, self.bridge.hooks(fwd_hooks=[(hook_name(site), adapt(fn)) for site, fn in hooks]):
            yield

    def read(self, tokens: Tokens, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Run prompts once and return copies of the activations at ``sites``, detached."""
        found: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], None]:
            return lambda tensor: found.__setitem__(site, tensor.detach().clone())

        with torch.no_grad(), self.hooks([(site, keep(site)) for site in sites]):
            self.forward(tokens)
        return found

    def logits(self, prompts: Sequence[str] | Tokens) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits after each prompt, float32."""
        tokens = prompts if isinstance(prompts, Tokens) else self.tokenize(prompts)
        with torch.no_grad(), self.lock:
            return self.forward(tokens)[:, -1].float()

    def forward(self, tokens: Tokens, keep: int = 1) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of the last ``keep`` positions, padding handled by mask and position ids.

        Gradients follow the caller's grad mode.
        """
        with self.lock:
            return self.hf_model(
                input_ids=tokens.ids,
                attention_mask=tokens.mask.long(),
                position_ids=tokens.position_ids,
                logits_to_keep=keep,
                use_cache=False,
            ).logits

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64, batch_size: int = 16) -> list[str]:
        """Greedy replies to chat prompts, special tokens left out; one reply a prompt, in order."""
        from tqdm.auto import tqdm
        from transformers import GenerationConfig

        # the model's own generation options may hold a repetition penalty, which is not greedy
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            eos_token_id=self.hf_model.generation_config.eos_token_id,
        )
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        replies = [""] * len(prompts)
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="generating", leave=False, disable=len(starts) < 2):
            chunk = order[start : start + batch_size]
            tokens = self.tokenize([prompts[k] for k in chunk])
            with self.lock, torch.no_grad():
                out = self.hf_model.generate(
                    input_ids=tokens.ids,
                    attention_mask=tokens.mask.long(),
                    generation_config=greedy,
                )
            texts = self.tokenizer.batch_decode(out[:, tokens.ids.shape[1] :], skip_special_tokens=True)
            for k, text in zip(chunk, texts, strict=True):
                replies[k] = text.strip()
        return replies

    def cache(
        self, prompts: Sequence[str] | Tokens, sites: Sequence[str] = ("resid", "z")
    ) -> "mechsafety.cache.ActivationCache":
        """Run prompts once and keep the asked-for activations (see `ActivationCache`)."""
        from mechsafety.cache import ActivationCache

        return ActivationCache.run(self, prompts if isinstance(prompts, Tokens) else self.tokenize(prompts), sites)

    # --- weights ------------------------------------------------------------------------------------------------

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of a layer's heads."""
        return self.bridge.blocks[layer].attn.W_O

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights of a layer's neurons."""
        return self.bridge.blocks[layer].mlp.W_out

    def mlp(self, layer: int, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What a layer's MLP adds when it reads ``resid``: norm, MLP, and the norm after it where there is one.

        ``resid`` is the stream after attention (before it in parallel blocks).
        """
        with self.lock:
            return self._mlp(self.bridge.blocks[layer], resid)

    def _mlp(self, block: Any, resid: Tensor) -> Tensor:
        if hasattr(block, "ln2"):
            resid = block.ln2(resid)
        elif self.parallel:
            resid = block.ln1(resid)
        out = block.mlp(resid)
        return block.ln2_post(out) if hasattr(block, "ln2_post") else out

    @cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding weights."""
        return self.bridge.W_U

    def frozen_final_norm(
        self, resid: Float[Tensor, "*rows d_model"]
    ) -> Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows d_model"]]:
        """The final norm as a linear map (plus bias), its scale frozen at that of ``resid`` and its weight applied.

        Parts of a residual stream can be sent through it one by one: their images sum to the norm's output, once the
        bias (LayerNorm only), which the returned function adds each time, is counted once.
        """
        norm, cfg = self.bridge.ln_final, self.bridge.cfg
        weight = norm.weight.float() + (1.0 if cfg.rmsnorm_uses_offset else 0.0)
        x = resid.float()
        if cfg.uses_rms_norm:
            scale = (x.square().mean(-1, keepdim=True) + cfg.eps).sqrt()
            return lambda part: part.float() / scale * weight
        scale = (x.var(-1, keepdim=True, unbiased=False) + cfg.eps).sqrt()
        bias = norm.bias.float() if getattr(norm, "bias", None) is not None else torch.zeros_like(weight)
        return lambda part: (part.float() - part.float().mean(-1, keepdim=True)) / scale * weight + bias

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of all parameters, by name."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.hf_model.state_dict().items()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def provenance(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Provenance:
        """Provenance of a result computed with this model."""
        template = self.tokenizer.chat_template or ""
        return Provenance(
            model=self.name,
            weights_sha256=self.weights_sha256,
            dtype=self.dtype_name,
            device=self.device.type,
            template_sha256=hashlib.sha256(str(template).encode()).hexdigest(),
            seed=seed,
            options=dict(options or {}),
            versions=package_versions(),
        )


def _difference(model: LensModel, pairs: PromptPairs, index: int) -> str:
    rows = []
    for prompt in (pairs.harmful[index], pairs.harmless[index]):
        spans = model.tokenize([prompt]).spans[0]
        rows.append(model.token_strings(prompt)[slice(*spans.instruction)])
    first = next((k for k, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
    harmful, harmless = (f"{len(row)} tokens {row}" for row in rows)
    return f"harmful {harmful}, harmless {harmless}, first difference at {first}"
