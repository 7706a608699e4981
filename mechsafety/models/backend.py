"""The interface to a TransformerLens model, the same for both of its generations.

Two modules implement it: `bridge` (TransformerLens 4) and `hooked` (TransformerLens 3.9). No other module calls
TransformerLens. Its hook names are in `sites`.
"""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.models.placed import check_in_memory, fetched
from mechsafety.prompts import Tokens
from mechsafety.sites import Site

Hook = tuple[Site, Callable[[Tensor], "Tensor | None"]]
# keys and values of a layer's first columns, each [batch kv_head pos d_head]; each backend decides how far they are
# processed (rotated, normed)
Prefix = tuple[tuple[Tensor, Tensor], ...]
# a block's attention or its MLP
Half = Literal["attn", "mlp"]
# a module, the name of one of its parameters, and that parameter's axis (0 or -1) along the residual stream
Writer = tuple[nn.Module, str, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes and shape of a model.

    Attributes:
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab, n_ctx: Sizes; d_mlp is 0 with ``experts``.
        parallel: Whether attention and MLP of a block read the same stream (GPT-NeoX).
        post_norm: Whether a norm stands between the heads' summed output and the residual stream (Gemma-2, OLMo-2).
        experts: Whether some MLP is a mixture of experts, which has no neurons of its own.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    parallel: bool
    post_norm: bool
    experts: bool = False


@dataclass(frozen=True, slots=True)
class NormForm:
    """A norm as numbers: ``(x - mean) / sqrt(square + eps) * weight + bias``.

    ``mean`` is the mean of ``x`` over its last axis if ``centred`` (LayerNorm), otherwise 0. ``square`` is the mean of
    ``(x - mean) ** 2`` over that axis.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float
    centred: bool

    def scale(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """What the norm divides ``x`` by; float32."""
        x = x.float()
        square = x.var(-1, keepdim=True, unbiased=False) if self.centred else x.square().mean(-1, keepdim=True)
        return (square + self.eps).sqrt()

    def frozen(self, x: Float[Tensor, "*rows d_model"]) -> Callable[[Tensor], Tensor]:
        """The norm as a linear map (plus bias) for parts of ``x``, with its scale frozen at that of ``x``; float32."""
        scale = self.scale(x)
        if not self.centred:
            return lambda part: part.float() / scale * self.weight
        return lambda part: (part.float() - part.float().mean(-1, keepdim=True)) / scale * self.weight + self.bias


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A block call's arguments besides its input; only the backend that stored them reads them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def rows(self, batch: int, rows: slice) -> "BlockCall":
        """The same call for some rows of a run of ``batch`` prompts."""
        return BlockCall(rows_of(self.args, batch, rows), {k: rows_of(v, batch, rows) for k, v in self.kwargs.items()})


class Backend(ABC):
    """One TransformerLens model.

    Attributes:
        tl_model: TransformerLens' own object.
        module: The torch module that holds the weights.
        sizes: Sizes.
        rounding: Factor on the usual tolerance for the distance of its logits from Hugging Face's. It is 1 if the
            backend runs Hugging Face's own code.
    """

    tl_model: Any
    module: nn.Module
    sizes: Sizes
    rounding: float

    @property
    def device(self) -> torch.device:
        """Where tokens go, logits come from, and functions on activations see them."""
        return next(self.module.parameters()).device

    @property
    def offloaded(self) -> bool:
        """Whether some weights are without numbers until their module runs (see `mechsafety.models.placed`)."""
        return False

    def check_in_memory(self, what: str) -> None:
        """Refuse offloaded or quantised weights for what needs all numbers as they are (`placed.check_in_memory`)."""
        check_in_memory(self.module, what)

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name."""

    @abstractmethod
    def hooks(self, edits: Sequence[Hook]) -> AbstractContextManager[Any]:
        """Context in which each function sees its site's activation and may return another."""

    def plain_logits(self, ids: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos d_vocab"]:
        """Logits of TransformerLens' own forward on one unpadded row."""
        with torch.no_grad():
            logits: Tensor = self.tl_model(ids, attention_mask=torch.ones_like(ids))[0].float()
            return logits

    @abstractmethod
    def logits(self, tokens: Tokens, keep: int) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of a whole forward at the last ``keep`` columns."""

    @abstractmethod
    def prefix(self, tokens: Tokens, stop: int) -> Prefix:
        """Keys and values of the columns before ``stop``."""

    @abstractmethod
    def run(
        self, tokens: Tokens, start: int, prefix: Prefix, keep: int
    ) -> tuple[Float[Tensor, "batch keep d_vocab"], list[BlockCall]]:
        """Run the columns from ``start`` on; return logits of the last ``keep`` and each block call's arguments."""

    @abstractmethod
    def cache(self, prefix: Prefix, variants: int) -> Any:
        """A fresh key-value cache that holds the prefix for ``variants`` copies of the batch."""

    @abstractmethod
    def block(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], call: BlockCall, batch: int, cache: Any
    ) -> Float[Tensor, "row pos d_model"]:
        """Run one block on rows that repeat ``batch`` prompts; ``call`` is from the stored run of these prompts."""

    @abstractmethod
    def mlp(self, layer: int, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What a layer's MLP adds when it reads ``resid``, norms included."""

    @abstractmethod
    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm, unembedding and soft cap; float32."""

    @abstractmethod
    def new_cache(self, rows: int) -> Any:
        """An empty key-value cache, which `feed` fills."""

    @abstractmethod
    def repeat_cache(self, cache: Any, rows: int) -> None:
        """Let a cache of one row hold that row ``rows`` times."""

    @abstractmethod
    def feed(
        self, cache: Any, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch seen"], keep: int
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Read further columns into a cache; ``mask`` covers all columns read so far, with these at its end."""

    @property
    @abstractmethod
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, from the model's own files; empty if the files name none."""

    @property
    @abstractmethod
    def by_position(self) -> bool:
        """Whether attention depends on tokens' positions alone, so that padding inside a row changes nothing.

        This is False for a sliding window, which counts columns.
        """

    def rotation(self, lengths: Int[Tensor, " batch"]) -> tuple[Any, ...]:
        """One entry per row of these lengths: what its rotary angles depend on; () if they never change."""
        return ()

    @abstractmethod
    def _block(self, layer: int) -> Any:
        """TransformerLens' block; both generations name its weights alike."""

    @abstractmethod
    def norms(self, layer: int, *names: str) -> list[nn.Module]:
        """A block's norms of the given names (``ln1``, ``ln1_post``, ``ln2``, ``ln2_post``), without missing ones."""

    @abstractmethod
    def norm_form(self, norm: nn.Module) -> NormForm:
        """The numbers of a norm over the residual stream: of the final norm, or of one from `norms`."""

    @abstractmethod
    def reads(self, layer: int, edit: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Context of one pass, in which a layer's heads read what ``edit`` makes of their norm's output.

        ``edit`` is called once, or never if no norm stands before the heads.
        """

    @contextmanager
    def for_rows(
        self,
        layer: int,
        part: Half,
        rows: Int[Tensor, " row"],
        n: int,
        others: Float[Tensor, "batch pos d_model"],
    ) -> Iterator[None]:
        """Context of one run, in which a layer's attention or MLP runs for some rows only.

        Args:
            layer: The layer.
            part: What runs for fewer rows; `running_module` must have it.
            rows: The rows for which it runs, at least one.
            n: Number of rows of the run.
            others: What the other rows get as its output, repeated for each variant.
        """
        module = self.running_module(layer, part)
        assert module is not None, (layer, part)

        def fewer(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
            def some(value: Any) -> Any:
                return self._rows_of_cache(rows_of(value, n, rows), layer, rows)

            return tuple(map(some, args)), {key: some(value) for key, value in kwargs.items()}

        def all_rows(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            found, *rest = out if isinstance(out, tuple) else (out,)
            whole = expand_rows(others.to(found.device, found.dtype), n // len(others))
            whole = whole.index_copy(0, rows.to(found.device), found)
            return (whole, *rest) if isinstance(out, tuple) else whole

        before = _hooked([partial(module.register_forward_pre_hook, with_kwargs=True)], fewer)
        with before, forward_hooks([module], all_rows):
            yield

    @abstractmethod
    def running_module(self, layer: int, part: Half) -> nn.Module | None:
        """The module that computes a layer's attention or MLP; None if none does, or not row by row."""

    @abstractmethod
    def _rows_of_cache(self, value: Any, layer: int, rows: Int[Tensor, " row"]) -> Any:
        """A key-value cache that holds some rows of a layer; any other value as it is."""

    def mlp_reads(self, layer: int, edit: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Context in which a layer's MLP reads what ``edit`` makes of the residual stream; the stream itself stays.

        There must be a norm before the MLP alone (``norms(layer, "ln2")``).
        """
        return input_hooks(self.norms(layer, "ln2"), lambda module, args: (self._at_home(edit)(args[0]), *args[1:]))

    @abstractmethod
    def writers(self) -> list[Writer]:
        """All parameters that write to the residual stream: embeddings, and output weights and biases of the blocks.

        Raises:
            MechsafetyError: Some of them have no known name.
        """

    @contextmanager
    def block_inputs(self) -> Iterator[dict[int, Tensor]]:
        """Context that records the input of every block, as it is before any edit in that block."""
        seen: dict[int, Tensor] = {}

        def note(layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        with self.block_calls(note):
            yield seen

    @contextmanager
    def block_calls(self, note: Callable[[int, tuple[Any, ...], Mapping[str, Any]], None]) -> Iterator[None]:
        """Context in which ``note(layer, args, kwargs)`` gets each block call's arguments before the block runs."""

        def hook(layer: int) -> Callable[..., None]:
            return lambda module, args, kwargs: note(layer, args, kwargs)

        handles: list[Any] = []
        try:
            for layer in range(self.sizes.n_layers):
                handles.append(self._block(layer).register_forward_pre_hook(hook(layer), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def head_norm(self, layer: int, slot: str) -> nn.Module | None:
        """The norm of a layer's queries or keys (slot ``q`` or ``k``); None if there is none."""
        return getattr(self._block(layer).attn, f"{slot}_norm", None)

    def _weight(self, module: Any, name: str, slot: str) -> Tensor:
        """A module's weight on the model's device, fetched if it is offloaded; ``slot`` is the child that holds it."""
        with fetched(module._modules.get(slot) or module) if self.offloaded else nullcontext():
            return self._here(getattr(module, name))

    def _here(self, tensor: Tensor) -> Tensor:
        """A tensor on the model's device."""
        return tensor

    def _at_home(self, function: Callable[[Tensor], "Tensor | None"]) -> Callable[[Tensor], "Tensor | None"]:
        """A function of activations for a layer on another device: it sees and returns them on the model's device."""
        return function

    def _or_zeros(self, module: Any, name: str, weight: Tensor, slot: str) -> Tensor:
        """A module's bias; zeros of the width that its weight writes if it has none."""
        with fetched(module._modules.get(slot) or module) if self.offloaded else nullcontext():
            bias = getattr(module, name, None)
            return self._here(bias) if bias is not None else weight.new_zeros(weight.shape[-1])

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of a layer's heads."""
        return self._weight(self._block(layer).attn, "W_O", "o")

    def b_O(self, layer: int) -> Float[Tensor, " d_model"]:
        """Output bias of a layer's attention; zeros where there is none."""
        return self._or_zeros(self._block(layer).attn, "b_O", self.W_O(layer), "o")

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights of a layer's neurons."""
        return self._weight(self._block(layer).mlp, "W_out", "out")

    def W_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights of a layer's neurons; in a gated MLP, those of the linear branch."""
        return self._weight(self._block(layer).mlp, "W_in", "in")

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """Value weights: one per key-value head, or repeated to all heads, as the generation stores them."""
        return self._weight(self._block(layer).attn, "W_V", "v")

    def b_out(self, layer: int) -> Float[Tensor, " d_model"]:
        """Output bias of a layer's MLP; zeros where there is none."""
        return self._or_zeros(self._block(layer).mlp, "b_out", self.W_out(layer), "out")

    @abstractmethod
    def part_weights(self, layer: int) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Weights and biases of a layer's heads and neurons by TransformerLens' names, without those that it lacks.

        Keys and values have one entry per key-value head. A mixture of experts has no neurons.

        Returns:
            The parameter that the model computes with, and a view of it in TransformerLens' shape.
        """

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding weights."""
        return self._weight(self.tl_model, "W_U", "unembed")

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias; zeros where there is none."""
        return self._or_zeros(self.tl_model.unembed, "b_U", self.W_U, "")

    @property
    def last_norm(self) -> nn.Module:
        """The module of the final norm."""
        norm: nn.Module = self.tl_model.ln_final
        return norm

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits; 0 where there is none."""
        return max(0.0, float(self.tl_model.cfg.output_logits_soft_cap))

    @property
    def score_cap(self) -> float:
        """Soft cap of attention scores; 0 where there is none."""
        return max(0.0, float(getattr(self.tl_model.cfg, "attn_scores_soft_cap", None) or 0.0))

    def capped(self, logits: Tensor) -> Tensor:
        """The logits under their soft cap; unchanged if the model has none."""
        cap = self.logit_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    @property
    def final_norm(self) -> NormForm:
        """The final norm as numbers."""
        return self.norm_form(self.last_norm)


def is_wrapped(model: Any) -> bool:
    """Whether this is a TransformerLens model of either generation."""
    from mechsafety.models import bridge, hooked

    return bridge.is_mine(model) or hooked.is_mine(model)


def wrapped_name(model: Any) -> str:
    """The name that a TransformerLens model was loaded under; empty if it has none."""
    return "" if model.cfg.model_name == "custom" else model.cfg.model_name


def check_known(model: Any) -> None:
    """Refuse a Hugging Face model that the installed TransformerLens does not know; its weights are not read.

    Raises:
        MechsafetyError: TransformerLens does not know the model's class, which the message names.
    """
    from mechsafety.models import bridge, hooked

    (hooked if hooked.installed() else bridge).check_known(model)


def wrap(name: str, model: Any, tokenizer: Any) -> Backend:
    """The backend of a TransformerLens model; the installed TransformerLens first wraps a Hugging Face model.

    Raises:
        MechsafetyError: TransformerLens does not know the architecture, or the model was changed in a way that the
            analyses cannot work with.
    """
    from mechsafety.models import bridge, hooked

    _own_tensors(model)
    backend: Backend
    for generation in (bridge, hooked):
        if generation.is_mine(model):
            backend = generation.wrap(model)
            break
    else:
        generation = hooked if hooked.installed() else bridge
        try:
            backend = generation.convert(name, model, tokenizer)
        except MechsafetyError:
            raise
        except Exception as error:  # TransformerLens raises whatever it meets; the user needs one line
            raise MechsafetyError(
                f"TransformerLens cannot wrap a {type(model).__name__} ({first_line(error)})",
                expected=f"an architecture that {generation.NAME} knows",
            ) from error
    for parameter in backend.module.parameters():
        parameter.requires_grad_(False)  # analyses differentiate activations, never weights
    return backend


def _own_tensors(model: nn.Module) -> None:
    """Replace weights that were made in inference mode by copies, because no gradient can pass through such weights."""
    copies: dict[int, Any] = {}  # one copy per original, so that tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().clone()
                    copies[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
                tensors[name] = copies[id(tensor)]


@dataclass(slots=True)
class Use:
    """Who runs a model now.

    A model has one `Use`, however often it is wrapped, because hooks live on its shared modules.

    Attributes:
        lock: A thread holds it while it runs the model.
        edits: One pair per open edit: its number, and whether it acts by column. They change only under the lock.
    """

    lock: Any = field(default_factory=threading.RLock)
    edits: list[tuple[int, bool]] = field(default_factory=list)


_USES: "weakref.WeakKeyDictionary[nn.Module, Use]" = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def use_of(module: nn.Module) -> Use:
    """The one `Use` of a model."""
    with _MAKING:
        return _USES.setdefault(module, Use())


def expand_rows(tensor: Tensor, variants: int) -> Tensor:
    """Repeat a [batch ...] tensor for each variant: [(variant batch) ...]."""
    return repeat(tensor, "batch ... -> (variant batch) ...", variant=variants)


def expand_batched(value: Any, batch: int, variants: int) -> Any:
    """Repeat a value once per variant if its first axis is the batch of a stored run; tuples item by item."""
    if isinstance(value, torch.Tensor):
        has_batch = value.ndim > 1 and value.shape[0] == batch and batch > 1
        return expand_rows(value, variants) if has_batch and variants > 1 else value
    if isinstance(value, tuple):
        return tuple(expand_batched(item, batch, variants) for item in value)
    return value


def rows_of(value: Any, batch: int, rows: slice | Tensor) -> Any:
    """Some rows of a value if its first axis is the batch of a stored run; tuples item by item."""
    if isinstance(value, torch.Tensor):
        if value.ndim < 2 or value.shape[0] != batch:
            return value
        return value[rows.to(value.device) if isinstance(rows, torch.Tensor) else rows]
    if isinstance(value, tuple):
        return tuple(rows_of(item, batch, rows) for item in value)
    return value


def adapt(function: Callable[[Tensor], "Tensor | None"]) -> Callable[..., "Tensor | None"]:
    """A function of a tensor in the form that TransformerLens calls, which passes the hook as well."""
    return lambda tensor, hook: function(tensor)


def is_lens(model: Any, name: str) -> bool:
    """Whether ``model`` is of TransformerLens' class ``name`` or one derived from it; imports nothing."""
    return any(kind.__name__ == name and kind.__module__.startswith("transformer_lens") for kind in type(model).__mro__)


def forward_hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> AbstractContextManager[None]:
    """Context in which ``hook(module, args, out)`` sees each module's output and may return a replacement."""
    return _hooked([module.register_forward_hook for module in modules], hook)


def input_hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> AbstractContextManager[None]:
    """Context in which ``hook(module, args)`` sees each module's arguments and may return others."""
    return _hooked([module.register_forward_pre_hook for module in modules], hook)


@contextmanager
def _hooked(registers: Sequence[Callable[[Callable[..., Any]], Any]], hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as handles:
        for register in registers:
            handles.callback(register(hook).remove)
        yield
