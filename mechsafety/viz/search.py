"""How a circuit was found, in plain words, for the report."""

from dataclasses import dataclass

from mechsafety.circuits.circuit import Backup, RefusalCircuit, Search
from mechsafety.viz.words import interval, number, p_value, plain, units

NAMED = 12  # number of nodes and edges listed by name
SEEN_TO_THE_END = {
    True: "No single {unit} more can leave without missing the target.",
    False: "Single {unit}s could still leave without missing the target.",
    None: "Whether single {unit}s could still leave was not seen to the end.",
}


@dataclass(frozen=True, slots=True)
class SearchSection:
    """What the report says of the search.

    Attributes:
        sentences: Sentences, in the order of the search.
        backups: One row per backup, with its numbers as text.
        cut: What was left out.
    """

    sentences: tuple[str, ...]
    backups: tuple[dict[str, str], ...] = ()
    cut: tuple[str, ...] = ()


def search_section(circuit: RefusalCircuit) -> SearchSection:
    """The search of a circuit; one sentence where the circuit does not say how it was found."""
    search = circuit.search
    if search is None:
        return SearchSection(("This circuit does not say how it was found.",))
    unit = units(circuit, 1)
    sentences = [
        f"The best {search.ranked} of the ranking of {circuit.n_candidates} candidate {unit}s are its shortest part "
        "that was found to reach the target or to fit the size asked for. Exact removal then took "
        f"{search.removed} of them away again. {SEEN_TO_THE_END[search.minimal].format(unit=unit)}",
        _backups(circuit, search),
    ]
    if search.linked:
        sentences.append(
            f"{_count(len(search.linked), 'edge')} of {len(circuit.edges)} stand only for connection: without them "
            "some node would lie on no path from the prompt to the logits. They need not be strong."
        )
    if search.dropped:
        sentences.append(
            f"{_count(len(search.dropped), 'node')} left the circuit because no edge of theirs carries anything: "
            f"{_named(search.dropped)}."
        )
    if not search.cut:
        sentences.append("Nothing was cut short to save time.")
    rows = tuple(_row(backup, circuit) for backup in search.backups)
    return SearchSection(tuple(text for text in sentences if text), rows, tuple(map(plain, search.cut)))


def _backups(circuit: RefusalCircuit, search: Search) -> str:
    if circuit.level == "edge":
        return "Backups (parts that stand in for others) are not looked for in a search of edges."
    if not search.backups:
        return "No backups (parts that stand in for others) were added."
    n = len(search.backups)
    return (
        f"{_count(n, 'backup')} {'was' if n == 1 else 'were'} found: alone such a part hardly matters, patched "
        "together with what it stands in for it does."
    )


def _row(backup: Backup, circuit: RefusalCircuit) -> dict[str, str]:
    return {
        "node": str(backup.node),
        "primary": str(backup.primary),
        "single": number(backup.single),
        "primary_effect": number(backup.primary_effect),
        "joint": number(backup.joint),
        "ci": interval(backup.ci),
        "p": p_value(backup.p_value).removeprefix("p ").removeprefix("= "),
        "kept": "yes" if backup.node in circuit else "no",
    }


def _named(parts: tuple[object, ...]) -> str:
    return ", ".join(map(str, parts[:NAMED])) + (f" and {len(parts) - NAMED} more" if len(parts) > NAMED else "")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
