"""How a circuit was found, in plain words, for the report."""

from dataclasses import dataclass

from mechsafety.circuits.circuit import Backup, RefusalCircuit, Search
from mechsafety.viz.words import interval, number, p_value, plain, units

NAMED = 12  # number of nodes and edges listed by name
SEEN_TO_THE_END = {
    True: "No further single {unit} can be removed without missing the target.",
    False: "Single {unit}s could still be removed without missing the target.",
    None: "The search ended before it was known whether single {unit}s could still be removed.",
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
    trained = circuit.provenance.options.get("search") == "masks"
    ranked = "Masks that were trained together ranked the parts. " if trained else ""
    sentences = [
        f"{ranked}The search kept the first {search.ranked} in the ranking of {circuit.n_candidates} candidate "
        f"{unit}s: the shortest such set that was found to meet the goal or to fit the requested size. Exact "
        "removal then took "
        f"{search.removed} of them away. {SEEN_TO_THE_END[search.minimal].format(unit=unit)}",
        _backups(circuit, search),
    ]
    if search.linked:
        sentences.append(
            f"Only to connect a node, which would otherwise lie on no path from the prompt to the logits, the circuit "
            f"keeps {len(search.linked)} of its {_count(len(circuit.edges), 'edge')}. Such an edge may be weak."
        )
    if search.dropped:
        sentences.append(
            f"{_count(len(search.dropped), 'node')} left the circuit because none of their edges carries anything: "
            f"{_named(search.dropped)}."
        )
    if not search.cut:
        sentences.append("Nothing was cut short to save time.")
    rows = tuple(_row(backup, circuit) for backup in search.backups)
    return SearchSection(tuple(text for text in sentences if text), rows, tuple(map(plain, search.cut)))


def _backups(circuit: RefusalCircuit, search: Search) -> str:
    if not search.backups:
        return "No backups (parts that replace a primary part when it is patched) were added."
    n, inside = len(search.backups), sum(backup.node in circuit for backup in search.backups)
    return (
        f"{_count(n, 'backup')} {'was' if n == 1 else 'were'} found. Patched alone, a backup hardly matters. Patched "
        f"together with its primary part, it does. {inside or 'None'} of them {'is' if inside < 2 else 'are'} in the "
        f"circuit and counted among its {len(circuit.nodes)} parts."
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
