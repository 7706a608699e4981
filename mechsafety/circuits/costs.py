"""How much work the stages of a map are, before they are done. A bar tells the time left from it."""

from dataclasses import dataclass

from mechsafety.circuits.options import MapOptions

# All numbers were fitted to the seconds of two maps of the demo model, one of them a first look, on two cores.
# a gradient costs as much as so many runs, and is taken at so many points
GRADIENT, STEPS = 2.5, 8
# circuits on the curve of sizes and in the bisection
CURVE = 28
# what a node that is patched alone costs, and what one node's backups cost: for many nodes none are looked for
ALONE, BACKUP = 0.5, 12
# what a node's role costs: about a dozen groups of paths, each through half of the layers
FLOWS = 6
# what completeness costs per pair, and what does not depend on the number of control pairs
COMPLETE, FIXED = 36, 200
# a circuit holds about this share of the parts, before the search has found it
GUESS = 0.2


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a map measures.

    Attributes:
        here, held: Pairs to rank on, and to set the size on.
        few, controls: Pairs on which roles, and on which random circuits are measured.
        parts: Everything that a circuit can be made of.
        circuit: Parts of the circuit; None before it is found.
    """

    here: int
    held: int
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
    # masks are trained in the search, and again for each resample
    masks = GRADIENT * options.training.steps * min(options.training.batch, sizes.here)
    training = masks if options.search == "masks" else 0.0
    search = both * (CURVE + n) + training
    alone = ALONE * (few + controls) * (n + options.shortlist)
    alone += BACKUP * few * options.n_backup_parts + options.resamples * training
    wire = few * (FLOWS * n + options.n_edges / 2 + GRADIENT * STEPS)
    check = FIXED + controls * (2 * options.n_random + (n + options.n_added) / 2 + COMPLETE)
    return rank, search, alone, wire, check
