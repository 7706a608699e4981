"""How much work the stages of a map are, before they are done. A bar tells the time left from it."""

from dataclasses import dataclass

from mechsafety.circuits.options import MapOptions

# a gradient costs as much as so many runs, and is taken at so many points
GRADIENT, STEPS = 3, 8
# circuits on the curve of sizes and in the bisection
CURVE = 28
# circuits that are tried for one node's backups
BACKUP = 30
# groups of paths whose effect is measured for a node's role, each through half of the layers
FLOWS = 4
# circuits that completeness tries
COMPLETE = 36
# a circuit holds about this share of the parts, before the search has found it
GUESS = 0.2


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a map measures.

    Attributes:
        here, held, fresh: Pairs to rank on, to set the size on, and to check on.
        few, controls: Pairs on which roles, and on which random circuits are measured.
        parts: Everything that a circuit can be made of.
        circuit: Parts of the circuit; None before it is found.
    """

    here: int
    held: int
    fresh: int
    few: int
    controls: int
    parts: int
    circuit: int | None = None


def expected_work(sizes: Sizes, options: MapOptions) -> tuple[float, float, float, float, float]:
    """About how many runs of one circuit on one pair each stage after the draw of pairs needs.

    Args:
        sizes: How much is measured.
        options: Options of the map.

    Returns:
        Runs to rank, to search, to patch nodes one by one, to measure edges and roles, and to check.
    """
    n = GUESS * sizes.parts if sizes.circuit is None else sizes.circuit
    both, few, controls = sizes.here + sizes.held, sizes.few, sizes.controls
    rank = GRADIENT * STEPS * sizes.here
    search = both * (CURVE + n)
    # a node that is patched alone changes half of the layers, on average
    alone = (few + controls) * (n + options.shortlist) / 2
    alone += few * BACKUP * options.n_backup_parts + sizes.here * CURVE * options.n_resamples / 2
    wire = few * (FLOWS * n + options.n_edges / 2 + GRADIENT * STEPS)
    check = controls * (2 * options.n_random + (n + options.n_added) / 2 + COMPLETE) + CURVE * sizes.fresh
    return rank, search, alone, wire, check
