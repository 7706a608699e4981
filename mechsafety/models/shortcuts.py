"""The forward engine's shortcuts, and the one place where they are switched."""

from dataclasses import dataclass, fields, replace

from mechsafety.errors import MechsafetyError


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """What the forward engine leaves out; results are the same with each on or off.

    A model carries one (`LensModel.shortcuts`); stored runs keep the one they were made under. At load each is tested
    on the model itself, and one that is not exact there is off from the start.

    Attributes:
        shared_prefix: Keys and values of the columns before the first difference are computed once, for both runs of a
            pair and all their variants. Off: every run computes them again.
        start_layer: Blocks before the first edited one are not run; the stream enters from the stored run. Off: every
            run starts at the first block.
        drop_positions: Columns before the first difference are not run in variants. Off: every run has all columns
            (and needs no keys and values from before).
        last_logits: The unembedding is applied to the last column only. Off: to every column.
        batch_variants: Variants go through the model together. Off: one at a time.

    Example:
        >>> Shortcuts().without("start_layer").on
        ('shared_prefix', 'drop_positions', 'last_logits', 'batch_variants')
    """

    shared_prefix: bool = True
    start_layer: bool = True
    drop_positions: bool = True
    last_logits: bool = True
    batch_variants: bool = True

    @property
    def on(self) -> tuple[str, ...]:
        """Names of those that are on."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    def without(self, *names: str) -> "Shortcuts":
        """The same with some switched off.

        Raises:
            MechsafetyError: A name that is none of them.
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
        """One on, and what it needs: a kept prefix shows only where columns are dropped."""
        needed = {name, "drop_positions"} if name == "shared_prefix" else {name}
        on = cls().without(name).on  # an unknown name is an error there
        return cls().without(*(other for other in (*on, name) if other not in needed))


def _names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Shortcuts))


ALL_ON = Shortcuts()
