"""`ActivationCache`: stacked, typed, read-only activations of one batch of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind

# public site name -> kind of site that is stored for it
_STORED = {
    "resid": SiteKind.RESID_PRE,
    "z": SiteKind.Z,
    "head_out": SiteKind.Z,
    "q": SiteKind.Q,
    "k": SiteKind.K,
    "v": SiteKind.V,
    "pattern": SiteKind.PATTERN,
    "neurons": SiteKind.NEURONS,
    "attn_out": SiteKind.ATTN_OUT,
    "mlp_out": SiteKind.MLP_OUT,
}


@dataclass(frozen=True, slots=True)
class ActivationCache:
    """Activations of a batch of prompts, layer axis first.

    Only the named sites are stored. Reading any other site raises an error that says so. Padded columns hold
    meaningless values, so select positions with ``tokens.mask`` or a span mask. Stored tensors are read-only inference
    tensors: writing to one is an error, and so is training on one. ``.clone()`` gives one of your own.

    Attributes:
        tokens: The prompts, with masks and spans.
        acts: Stored tensors by name.
        output_weights: Heads' output weights, for `head_out`.

    Example:
        >>> cache = model.cache(harmful, sites=["z", "pattern"])
        >>> cache.z.shape  # layer, head, batch, position, d_head
        torch.Size([4, 4, 8, 13, 16])
    """

    tokens: Tokens
    acts: Mapping[str, Tensor]
    output_weights: Float[Tensor, "layer head d_head d_model"] | None = None

    @classmethod
    def run(cls, model: LensModel, tokens: Tokens, sites: Sequence[str]) -> "ActivationCache":
        """Run the prompts once and store the named sites.

        Args:
            model: The model.
            tokens: The prompts.
            sites: Some of ``resid z head_out q k v pattern neurons attn_out mlp_out``.

        Raises:
            MechsafetyError: A name is unknown.
        """
        unknown = [sites] if isinstance(sites, str) else [name for name in sites if name not in _STORED]
        if unknown:
            raise MechsafetyError(f"unknown sites {unknown}", expected=f"a list of some of {list(_STORED)}")
        kinds = dict.fromkeys(_STORED[name] for name in sites)
        wanted = [Site(kind, layer) for kind in kinds for layer in range(model.n_layers)]
        if "resid" in sites:
            wanted.append(Site(SiteKind.FINAL_NORM_IN))
        store = model.read(tokens, wanted)
        acts = {}
        for name in dict.fromkeys("z" if name == "head_out" else name for name in sites):
            layers = [store[Site(_STORED[name], layer)] for layer in range(model.n_layers)]
            if name == "resid":
                layers.append(store[Site(SiteKind.FINAL_NORM_IN)])
            with torch.inference_mode():  # its tensors are the only read-only tensors of torch
                acts[name] = torch.stack(layers)
        weights = torch.stack([model.W_O(layer) for layer in range(model.n_layers)]) if "head_out" in sites else None
        return cls(tokens, MappingProxyType(acts), weights)

    def _get(self, name: str) -> Tensor:
        if name not in self.acts:
            raise MechsafetyError(
                f"{name!r} was not stored", expected=f"one of {list(self.acts)}", hint=f"ask for it: sites=[{name!r}]"
            )
        return self.acts[name]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.acts.items())
        return f"ActivationCache({len(self.tokens)} prompts: {shapes})"

    @property
    def opener_ids(self) -> tuple[int, ...]:
        """Tokens of a reply's opener that end every prompt."""
        return self.tokens.opener_ids

    @property
    def resid(self) -> Float[Tensor, "layer_plus_1 batch pos d_model"]:
        """Residual stream before every block; the last entry is the final norm's input."""
        return self._get("resid")

    @property
    def z(self) -> Float[Tensor, "layer head batch pos d_head"]:
        """Heads' mixed values, before the output weights."""
        return rearrange(self._get("z"), "layer batch pos head d_head -> layer head batch pos d_head")

    @property
    def head_out(self) -> Float[Tensor, "layer head batch pos d_model"]:
        """What each head writes, z W_O in float32; a layer's heads and its output bias sum to ``attn_out``.

        If a norm follows attention (Gemma-2, OLMo-2), they sum to the input of that norm instead.
        """
        if self.output_weights is None:
            raise MechsafetyError("'head_out' was not stored", hint="ask for it: sites=['head_out']")
        return einsum(
            self._get("z").float(),
            self.output_weights.float(),
            "layer batch pos head d_head, layer head d_head d_model -> layer head batch pos d_model",
        )

    @property
    def q(self) -> Float[Tensor, "layer head batch pos d_head"]:
        """Queries, before the rotary embedding."""
        return rearrange(self._get("q"), "layer batch pos head d_head -> layer head batch pos d_head")

    @property
    def k(self) -> Float[Tensor, "layer kv_head batch pos d_head"]:
        """Keys, one per key-value head, before the rotary embedding."""
        return rearrange(self._get("k"), "layer batch pos kv_head d_head -> layer kv_head batch pos d_head")

    @property
    def v(self) -> Float[Tensor, "layer kv_head batch pos d_head"]:
        """Values, one per key-value head."""
        return rearrange(self._get("v"), "layer batch pos kv_head d_head -> layer kv_head batch pos d_head")

    @property
    def pattern(self) -> Float[Tensor, "layer head batch pos source"]:
        """Attention from each position to each source position."""
        return rearrange(self._get("pattern"), "layer batch head pos source -> layer head batch pos source")

    @property
    def neurons(self) -> Float[Tensor, "layer batch pos d_mlp"]:
        """MLP neurons: the input of the down-projection."""
        return self._get("neurons")

    @property
    def attn_out(self) -> Float[Tensor, "layer batch pos d_model"]:
        """What attention adds to the residual stream."""
        return self._get("attn_out")

    @property
    def mlp_out(self) -> Float[Tensor, "layer batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        return self._get("mlp_out")
