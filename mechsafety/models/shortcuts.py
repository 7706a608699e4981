"""The forward engine's shortcuts, and the one place where they are switched."""

from dataclasses import dataclass, fields, replace

from mechsafety.errors import MechsafetyError


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """Which work the forward engine leaves out; results are the same with each shortcut on or off.

    Every model has one `Shortcuts` (`LensModel.shortcuts`). A stored run keeps the `Shortcuts` that it was made with.
    At load, each shortcut is tested on the model itself. A shortcut that is not exact there is off from the start.

    Attributes:
        shared_prefix: Keys and values of the columns before the first difference are computed once, for both runs of a
            pair and all their variants. Off: every run computes them again.
        start_layer: Blocks before the first edited one are not run; the residual stream comes from the stored run. Off:
            every run starts at the first block.
        drop_positions: Columns before the first difference are not run in variants. Off: every run has all columns
            (and needs no keys and values from before).
        last_logits: The unembedding is applied to the last column only. Off: to every column.
        batch_variants: Variants go through the model together. Off: one at a time.
        live_parts: An MLP runs only for variants in which its output counts, a layer's attention only for those in
            which any head's does. Off: both run for all variants, and what is replaced is thrown away.

    Example:
        >>> Shortcuts().without("start_layer").on
        ('shared_prefix', 'drop_positions', 'last_logits', 'batch_variants', 'live_parts')
    """

    shared_prefix: bool = True
    start_layer: bool = True
    drop_positions: bool = True
    last_logits: bool = True
    batch_variants: bool = True
    live_parts: bool = True

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the shortcuts that are on."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    def without(self, *names: str) -> "Shortcuts":
        """The same with some shortcuts switched off.

        Raises:
            MechsafetyError: A name is not a shortcut.
        """
        unknown = [name for name in names if name not in _names()]
        if unknown:
            raise MechsafetyError(f"shortcuts {unknown}", expected=f"some of {_names()}")
        return replace(self, **dict.fromkeys(names, False))

    @classmethod
    def none(cls) -> "Shortcuts":
        """All off: every variant is a whole forward from the first block."""
        return cls().without(*cls().on)

    @classmethod
    def only(cls, name: str) -> "Shortcuts":
        """One shortcut on, with what it needs: a shared prefix has an effect only if columns are dropped."""
        needed = {name, "drop_positions"} if name == "shared_prefix" else {name}
        on = cls().without(name).on  # an unknown name is an error there
        return cls().without(*(other for other in (*on, name) if other not in needed))


def _names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Shortcuts))


ALL_ON = Shortcuts()
