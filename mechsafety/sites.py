"""Typed addresses of activations; no other file knows TransformerLens' hook names.

Shapes are those of a batch of chat prompts: the axes ``batch pos`` first, then the axes of the site.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mechsafety.errors import MechsafetyError


class SiteKind(StrEnum):
    """What is read or edited at a layer.

    Example:
        >>> ms.Site(ms.sites.SiteKind.RESID_POST, 3) == ms.Site("resid_post", 3)
        True
    """

    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    Q = "q"
    K = "k"
    V = "v"
    Z = "z"
    SCORES = "scores"
    PATTERN = "pattern"
    NEURONS = "neurons"
    MLP_IN = "mlp_in"
    FINAL_NORM_IN = "final_norm_in"
    FINAL_NORM_OUT = "final_norm_out"


class Generation(StrEnum):
    """The two model classes of TransformerLens, which name some sites differently."""

    BRIDGE = "bridge"
    HOOKED = "hooked"


# do not edit at resid_mid: in TransformerBridge it is the MLP branch's input, so the skip branch would miss the edit
_HOOKS = {
    SiteKind.RESID_PRE: "blocks.{layer}.hook_resid_pre",
    SiteKind.RESID_MID: "blocks.{layer}.hook_resid_mid",
    SiteKind.RESID_POST: "blocks.{layer}.hook_resid_post",
    SiteKind.ATTN_OUT: "blocks.{layer}.hook_attn_out",
    SiteKind.MLP_OUT: "blocks.{layer}.hook_mlp_out",
    SiteKind.Q: "blocks.{layer}.attn.hook_q",
    SiteKind.K: "blocks.{layer}.attn.hook_k",
    SiteKind.V: "blocks.{layer}.attn.hook_v",
    SiteKind.Z: "blocks.{layer}.attn.hook_z",
    SiteKind.SCORES: "blocks.{layer}.attn.hook_attn_scores",
    SiteKind.PATTERN: "blocks.{layer}.attn.hook_pattern",
    SiteKind.NEURONS: "blocks.{layer}.mlp.hook_post",
    SiteKind.MLP_IN: "blocks.{layer}.mlp.hook_in",
    SiteKind.FINAL_NORM_IN: "ln_final.hook_in",
    SiteKind.FINAL_NORM_OUT: "ln_final.hook_out",
}
# HookedTransformer has no hook points there, so the input (:in) or output (:out) of the module itself is hooked
_HOOKED = {
    **_HOOKS,
    SiteKind.MLP_IN: "blocks.{layer}.mlp:in",
    SiteKind.FINAL_NORM_IN: "ln_final:in",
    SiteKind.FINAL_NORM_OUT: "ln_final:out",
}
INDEXED = frozenset({SiteKind.Q, SiteKind.K, SiteKind.V, SiteKind.Z, SiteKind.PATTERN, SiteKind.NEURONS})
GLOBAL = frozenset({SiteKind.FINAL_NORM_IN, SiteKind.FINAL_NORM_OUT})


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """Address of one activation.

    Attributes:
        kind: What is addressed.
        layer: Block index, from 0; None for sites after the last block.
        index: Head (key-value head for ``k`` and ``v``) or neuron; None for the whole site.

    Example:
        >>> str(Site(SiteKind.Q, 3, 1)), str(Site(SiteKind.RESID_MID, 3))
        ('L3.q.1', 'L3.resid_mid')
    """

    kind: SiteKind
    layer: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", SiteKind(self.kind))
        if (self.layer is None) != (self.kind in GLOBAL):
            raise MechsafetyError(
                f"Site({self.kind.value!r}, layer={self.layer})",
                expected="no layer" if self.kind in GLOBAL else "a layer",
            )
        if self.index is not None and self.kind not in INDEXED:
            raise MechsafetyError(f"{self.kind.value} has no parts to index", expected=f"one of {sorted(INDEXED)}")

    def __str__(self) -> str:
        place = "final" if self.layer is None else f"L{self.layer}"
        return f"{place}.{self.kind.value}" + ("" if self.index is None else f".{self.index}")


def hook_name(site: Site, generation: Generation = Generation.BRIDGE) -> str:
    """TransformerLens' name of a site; ``module:in`` or ``module:out`` if the site has no hook point."""
    names = _HOOKED if generation is Generation.HOOKED else _HOOKS
    return names[site.kind].format(layer=site.layer)


def hook_points(bridge: Any) -> list[Any]:
    """All hook points of a TransformerBridge; those with several names are there several times."""
    return list(bridge.hook_dict.values())
