"""TransformerLens 3.9: a `HookedTransformer`, TransformerLens' own model code on converted weights."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models.backend import (
    Backend,
    BlockCall,
    Half,
    Hook,
    NormForm,
    Prefix,
    Sizes,
    Writer,
    adapt,
    expand_rows,
    forward_hooks,
    is_lens,
)
from mechsafety.prompts import Tokens
from mechsafety.sites import Generation, hook_name

NAME = "HookedTransformer"


def is_mine(model: Any) -> bool:
    """Whether this is a HookedTransformer."""
    return is_lens(model, NAME)


def installed() -> bool:
    """Whether the installed TransformerLens still has it (before 4.0)."""
    package = importlib.util.find_spec("transformer_lens")  # looks for it without importing it
    folders = (package.submodule_search_locations or []) if package else []
    return any((Path(folder) / f"{NAME}.py").is_file() for folder in folders)


def check_known(model: Any) -> None:
    """Refuse a Hugging Face model that cannot be converted to a HookedTransformer.

    Raises:
        MechsafetyError: The model's class has no converter, or HookedTransformer lacks a setting of its configuration.
            The message names the class or the setting.
    """
    architecture = type(model).__name__
    if architecture not in _CONVERTERS:
        raise MechsafetyError(
            f"{NAME} cannot be made from a {architecture}",
            expected=f"one of {sorted(_CONVERTERS)}",
            hint="install transformer_lens>=4.3",
        )
    _options(model.config, architecture)


def convert(name: str, model: Any, tokenizer: Any) -> "HookedBackend":
    """Make a HookedTransformer with the weights of a Hugging Face model.

    The Hugging Face model stays unchanged. TransformerLens' own loader looks a model up by its official name. This
    function reads the model's own configuration instead.

    Raises:
        MechsafetyError: The architecture has no converter.
    """
    logging_level = logging.getLogger().level
    with _quiet():
        import transformer_lens
        from transformer_lens.pretrained import weight_conversions

        check_known(model)
        architecture = type(model).__name__
        parameter = next(model.parameters())
        options = _options(model.config, architecture)
        cfg = transformer_lens.HookedTransformerConfig(
            **options,
            model_name=name,
            original_architecture=architecture,
            dtype=parameter.dtype,
            device=str(parameter.device),
            init_weights=False,
        )
        lens = transformer_lens.HookedTransformer(cfg, tokenizer=None, move_to_device=False)
        with torch.no_grad():
            weights = getattr(weight_conversions, _CONVERTERS[architecture])(model, cfg)
        # load unfolded: folding would change the residual stream's basis, the unembedding's zero and the heads' biases
        lens.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    logging.getLogger().setLevel(logging_level)  # importing TransformerLens changes the root logger
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    # HookedTransformer is another implementation of the same model, so it rounds differently
    return HookedBackend(lens.eval().to(parameter.device, print_details=False), ends, rounding=10.0)


def wrap(lens: Any) -> "HookedBackend":
    """The backend of a HookedTransformer that the user made, with norms folded or not.

    Raises:
        MechsafetyError: The model repeats keys and values for all heads, or it lacks parts that the analyses read.
    """
    cfg = lens.cfg
    if cfg.ungroup_grouped_query_attention and cfg.n_key_value_heads:
        raise MechsafetyError(
            "a HookedTransformer that repeats its keys and values for all heads",
            expected="one per key-value head",
            hint="call set_ungroup_grouped_query_attention(False) on it",
        )
    plain = cfg.positional_embedding_type in ("standard", "rotary") and not cfg.num_experts and not cfg.attn_only
    if not plain or cfg.normalization_type is None:
        raise MechsafetyError(
            "a HookedTransformer without norms or plain MLPs, or with other positions",
            expected="a decoder with norms, MLPs, and standard or rotary positions",
        )
    return HookedBackend(lens.eval(), getattr(lens.tokenizer, "eos_token_id", None))


class HookedBackend(Backend):
    """See `Backend`."""

    def __init__(self, lens: Any, ends: int | Sequence[int] | None, rounding: float = 1.0) -> None:
        self.tl_model = self.module = lens
        self.rounding = rounding
        self.ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        cfg = lens.cfg
        # OLMo-2 and OLMo-3 blocks have two norms only: one after attention, one after the MLP
        self.norms_last = cfg.original_architecture in ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
        self.sizes = Sizes(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            parallel=bool(cfg.parallel_attn_mlp),
            post_norm=bool(cfg.use_normalization_before_and_after) or self.norms_last,
        )

    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name."""
        return dict(self.module.named_parameters())  # buffers are left out: rotary tables grow with use

    @contextlib.contextmanager
    def hooks(self, edits: Sequence[Hook]) -> Iterator[None]:
        """Context in which each function sees its site's activation and may return another."""
        named = [(hook_name(site, Generation.HOOKED), function) for site, function in edits]
        points = [(name, adapt(function)) for name, function in named if ":" not in name]
        handles: list[Any] = []
        try:
            for name, function in named:
                module, _, end = name.partition(":")
                if end == "in":
                    handles.append(self.tl_model.get_submodule(module).register_forward_pre_hook(_on_input(function)))
                elif end == "out":
                    handles.append(self.tl_model.get_submodule(module).register_forward_hook(_on_output(function)))
            with self.tl_model.hooks(fwd_hooks=points):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, tokens: Tokens, keep: int) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of a whole forward at the last ``keep`` columns."""
        return self._last(self._stream(tokens.ids, tokens.mask), keep)

    def prefix(self, tokens: Tokens, stop: int) -> Prefix:
        """Keys (before the rotary embedding) and values of the columns before ``stop``."""
        cache = self.new_cache(len(tokens))
        self._stream(tokens.ids[:, :stop], tokens.mask[:, :stop], cache)
        order = "batch pos kv_head d_head -> batch kv_head pos d_head"
        return tuple(
            (rearrange(entry.past_keys, order), rearrange(entry.past_values, order)) for entry in cache.entries
        )

    def run(
        self, tokens: Tokens, start: int, prefix: Prefix, keep: int
    ) -> tuple[Float[Tensor, "batch keep d_vocab"], list[BlockCall]]:
        """Run the columns from ``start`` on; return logits of the last ``keep`` and each block call's arguments."""
        cache = self._past(tokens, start, prefix) if start else None
        stream = self._stream(tokens.ids[:, start:], tokens.mask[:, start:], cache)
        return self._last(stream, keep), [BlockCall((), {"attention_mask": tokens.mask.long()})] * self.sizes.n_layers

    def cache(self, prefix: Prefix, variants: int) -> Any:
        """A frozen key-value cache that holds the prefix, one entry per layer."""
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as Entry

        def rows(tensor: Tensor) -> Tensor:
            return rearrange(expand_rows(tensor, variants), "row kv_head pos d_head -> row pos kv_head d_head")

        return [Entry(rows(keys), rows(values), frozen=True) for keys, values in prefix]

    def block(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], call: BlockCall, batch: int, cache: Any
    ) -> Float[Tensor, "row pos d_model"]:
        """Run one block on rows that repeat ``batch`` prompts; ``call`` is from the stored run of these prompts."""
        mask = expand_rows(call.kwargs["attention_mask"], hidden.shape[0] // batch)
        entry = None if cache is None else cache[layer]
        out: Tensor = self._block(layer)(hidden, past_kv_cache_entry=entry, attention_mask=mask)
        return out

    def mlp(self, layer: int, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What a layer's MLP adds when it reads ``resid``, norms included."""
        block = self._block(layer)
        out: Tensor = block.apply_mlp(resid if self.norms_last else block.ln2(resid))
        return out

    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm, unembedding and soft cap; float32."""
        return self.capped(self.tl_model.unembed(self.tl_model.ln_final(resid))).float()

    def new_cache(self, rows: int) -> Any:
        """An empty key-value cache, which `feed` fills."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.tl_model.cfg, self.W_U.device, rows)

    def repeat_cache(self, cache: Any, rows: int) -> None:
        """Let a cache of one row hold that row ``rows`` times."""
        for entry in cache.entries:
            entry.past_keys, entry.past_values = (expand_rows(t, rows) for t in (entry.past_keys, entry.past_values))
        cache.previous_attention_mask = expand_rows(cache.previous_attention_mask, rows)

    def feed(
        self, cache: Any, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch seen"], keep: int
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Read further columns into a cache; ``mask`` covers all columns read so far, with these at its end."""
        return self._last(self._stream(ids, mask[:, -ids.shape[1] :], cache), keep)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, from the model's own files; empty if the files name none."""
        return self.ends

    @property
    def by_position(self) -> bool:
        """Whether attention depends on tokens' positions alone, with no sliding window."""
        return not self.tl_model.cfg.use_local_attn

    def _block(self, layer: int) -> Any:
        """TransformerLens' block."""
        return self.tl_model.blocks[layer]

    def running_module(self, layer: int, part: Half) -> torch.nn.Module | None:
        """TransformerLens' own module."""
        module: torch.nn.Module = getattr(self._block(layer), part)
        return module

    def _rows_of_cache(self, value: Any, layer: int, rows: Int[Tensor, " row"]) -> Any:
        """A frozen entry that holds some rows of a layer's entry; any other value as it is."""
        if not hasattr(value, "past_keys"):
            return value
        keys, values = (tensor[rows.to(tensor.device)] for tensor in (value.past_keys, value.past_values))
        return type(value)(keys, values, frozen=True)

    def part_weights(self, layer: int) -> dict[str, tuple[torch.nn.Parameter, Tensor]]:
        """Weights and biases of a layer's heads and neurons: its own parameters."""
        block, found = self._block(layer), {}
        parts = [(block.attn, f"{kind}_{slot}") for kind in ("W", "b") for slot in ("Q", "K", "V", "O")]
        parts += [(block.mlp, f"{kind}_{place}") for kind in ("W", "b") for place in ("in", "gate", "out")]
        for module, name in parts:
            # with grouped queries the parameter is called _W_K, and W_K repeats it for all heads
            parameter = module._parameters.get(f"_{name}", module._parameters.get(name))
            if parameter is not None:
                found[name] = (parameter, parameter.detach())
        return found

    def norms(self, layer: int, *names: str) -> list[torch.nn.Module]:
        """A block's norms of the given names; names that it lacks are skipped."""
        block = self._block(layer)
        # if a block has norms only after attention and MLP, TransformerLens calls these ln1 and ln2
        known = {"ln1_post": "ln1", "ln2_post": "ln2"} if self.norms_last else {name: name for name in names}
        return [getattr(block, known[name]) for name in names if name in known and hasattr(block, known[name])]

    def reads(self, layer: int, edit: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
        """Context of one pass, in which a layer's heads read what ``edit`` makes of their norm's output."""
        made: list[Tensor] = []

        def once(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # the norm runs three times on the same input: for queries, keys and values
            if not made:
                made.append(edit(out))
            return made[0]

        return forward_hooks(self.norms(layer, "ln1"), once)

    def writers(self) -> list[Writer]:
        """All parameters that write to the residual stream."""
        tables: list[Writer] = [(self.tl_model.embed, "W_E", -1)]
        if self.tl_model.cfg.positional_embedding_type == "standard":
            tables.append((self.tl_model.pos_embed, "W_pos", -1))
        parts = [(block.attn, "O") for block in self.tl_model.blocks]
        parts += [(block.mlp, "out") for block in self.tl_model.blocks]
        return tables + [(part, f"{kind}_{end}", -1) for part, end in parts for kind in ("W", "b")]

    def norm_form(self, norm: torch.nn.Module) -> NormForm:
        """A norm as numbers; weight 1 and bias 0 if they were folded into the weights that read the norm."""
        own, bias = getattr(norm, "w", None), getattr(norm, "b", None)
        eps: Any = norm.eps
        weight = torch.ones(self.sizes.d_model, device=self.W_U.device) if own is None else own.float()
        shift = torch.zeros_like(weight) if bias is None else bias.float()
        return NormForm(weight, shift, float(eps), not type(norm).__name__.startswith("RMS"))

    def _stream(self, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """The residual stream after the last block."""
        layers = self.sizes.n_layers
        stream: Tensor = self.tl_model(ids, attention_mask=mask.long(), past_kv_cache=cache, stop_at_layer=layers)
        return stream

    def _last(self, stream: Tensor, keep: int) -> Tensor:
        # the norm runs on all columns, as its site promises; only the unembedding is expensive
        return self.capped(self.tl_model.unembed(self.tl_model.ln_final(stream)[:, -keep:]))

    def _past(self, tokens: Tokens, start: int, prefix: Prefix) -> Any:
        """A frozen TransformerLens cache of all layers that holds a prefix."""
        cache = self.new_cache(len(tokens))
        cache.entries = self.cache(prefix, 1)
        cache.previous_attention_mask = tokens.mask[:, :start].long()
        cache.freeze()
        return cache


def _on_input(function: Callable[[Tensor], "Tensor | None"]) -> Callable[..., Any]:
    return lambda module, args: function(args[0])


def _on_output(function: Callable[[Tensor], "Tensor | None"]) -> Callable[..., Any]:
    return lambda module, args, output: function(output)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context that hides TransformerLens' warning that 4.0 removes this class."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*deprecated and will be removed in 4.0", category=DeprecationWarning
        )
        yield


# --- configurations ---------------------------------------------------------------------------------------------------

_CONVERTERS = {
    "GPT2LMHeadModel": "convert_gpt2_weights",
    "GPTNeoXForCausalLM": "convert_neox_weights",
    "LlamaForCausalLM": "convert_llama_weights",
    "MistralForCausalLM": "convert_mistral_weights",
    "Qwen2ForCausalLM": "convert_qwen2_weights",
    "Qwen3ForCausalLM": "convert_qwen3_weights",
    "Phi3ForCausalLM": "convert_phi3_weights",
    "Gemma2ForCausalLM": "convert_gemma_weights",
    "Gemma3ForCausalLM": "convert_gemma_weights",
    "Olmo2ForCausalLM": "convert_olmo2_weights",
}


def _options(config: Any, architecture: str) -> dict[str, Any]:
    """HookedTransformerConfig's fields from a Hugging Face configuration."""
    common = {
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
    }
    if architecture == "GPT2LMHeadModel":
        return common | _gpt2(config)
    if architecture == "GPTNeoXForCausalLM":
        return common | _rotary(config) | _neox(config)
    options = common | _rotary(config) | _llama(config)
    if architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"):
        options |= {"use_qk_norm": True}
    if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        options |= {
            "act_fn": config.hidden_activation,
            "attn_scale": config.query_pre_attn_scalar**0.5,
            "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
            "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
            "use_normalization_before_and_after": True,
        }
    if architecture == "Olmo2ForCausalLM" and options["n_key_value_heads"] is not None:
        raise MechsafetyError(
            f"{NAME} cannot hold an OLMo-2 model with grouped queries",
            expected="as many key-value heads as heads",
            hint="install transformer_lens>=4.3",
        )
    return options


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def _neox(config: Any) -> dict[str, Any]:
    return {
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
    }


def _llama(config: Any) -> dict[str, Any]:
    """Fields of every architecture that is built like Llama."""
    grouped = config.num_key_value_heads != config.num_attention_heads
    # the converters of Mistral, Qwen2 and Gemma use the names of grouped weights even if no heads share keys and values
    always = config.model_type in ("mistral", "qwen2", "gemma2", "gemma3_text")
    options = {
        "d_mlp": config.intermediate_size,
        "act_fn": getattr(config, "hidden_act", None),
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "final_rms": True,
        "n_key_value_heads": config.num_key_value_heads if grouped or always else None,
    }
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    local = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    if window and "local" in local and getattr(config, "use_sliding_window", True):
        options |= {"use_local_attn": True, "window_size": window, "attn_types": local}
    return options


def _rotary(config: Any) -> dict[str, Any]:
    """Head size and rotary embedding; transformers 5 keeps the latter in one dictionary."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    local = rope.get("sliding_attention")
    if local is not None:  # Gemma-3: its sliding layers have a base of their own
        rope = dict(rope["full_attention"])
        if local.get("rope_type", "default") != "default":
            rope["rope_type"] = local["rope_type"]
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise MechsafetyError(f"{NAME} has no rotary embedding of type {kind!r}", expected="'default' or 'llama3'")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    options = {
        "d_head": d_head,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_dim": round(d_head * rope.get("partial_rotary_factor", 1.0)),
    }
    if local is not None:
        options |= {"rotary_base_local": local["rope_theta"]}
    if kind == "llama3":
        options |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    return options
