"""Multiply-adds (two operations each) of a decoder's matrix products, and the least that exact head patching needs."""

from dataclasses import dataclass

from mechsafety.models import LensModel


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that decide the cost of a forward."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    mlp_weights: int

    @classmethod
    def of(cls, model: LensModel) -> "Shape":
        sizes = [getattr(model, name) for name in list(cls.__slots__)[:-1]]
        return cls(*sizes, 3 if model.bridge.cfg.gated_mlp else 2)

    def query_output(self, columns: int) -> int:
        """Queries and output weights: twice d_model x (heads d_head)."""
        return 2 * 2 * self.d_model * self.n_heads * self.d_head * columns

    def keys_values(self, columns: int) -> int:
        return 2 * 2 * self.d_model * self.n_kv_heads * self.d_head * columns

    def attention(self, links: int) -> int:
        """Scores and weighted values of so many (query, key) pairs."""
        return 2 * 2 * self.n_heads * self.d_head * links

    def mlp(self, columns: int) -> int:
        return 2 * self.mlp_weights * self.d_model * self.d_mlp * columns

    def unembed(self, columns: int) -> int:
        return 2 * self.d_model * self.d_vocab * columns


def forward(shape: Shape, width: int) -> int:
    """A plain forward of one prompt: full squares of scores, logits of all columns."""
    block = shape.query_output(width) + shape.keys_values(width) + shape.attention(width**2) + shape.mlp(width)
    return shape.n_layers * block + shape.unembed(width)


def least_for_head(shape: Shape, layer: int, width: int, first: int) -> int:
    """What any exact method must do to patch one head's output at the columns from ``first`` on, for one prompt.

    The head's change through its output weights, its layer's MLP, every later block at those columns with causal
    scores, in the last block queries and MLP at the last column alone, and that column's logits.
    """
    columns, last = width - first, shape.n_layers - 1
    live = 1 if layer == last else columns
    total = 2 * shape.d_head * shape.d_model * live + shape.mlp(live) + shape.unembed(1)
    links = sum(range(first + 1, width + 1))
    for _ in range(layer + 1, last):
        total += shape.query_output(columns) + shape.keys_values(columns) + shape.attention(links) + shape.mlp(columns)
    if layer < last:
        total += shape.query_output(1) + shape.keys_values(columns) + shape.attention(width) + shape.mlp(1)
    return total


def floor_ratio(shape: Shape, width: int, first: int) -> float:
    """How many times fewer operations the least of all heads' patches takes than one plain forward for each."""
    least = sum(least_for_head(shape, layer, width, first) for layer in range(shape.n_layers))
    return shape.n_layers * forward(shape, width) / least


def floor_ratio_of_paths(shape: Shape, width: int, first: int, read: int, *, mlps: bool = True) -> float:
    """How many times fewer operations all heads' paths to the logits need than one plain forward for each.

    The least: both runs of a pair, the columns before ``first`` once; each head's change through its output weights and
    through the MLPs from its layer on, at the last column; and the ``read`` logits that the metric reads.

    Args:
        shape: The model's.
        width: Tokens of a prompt.
        first: Tokens that the prompts of a pair share.
        read: Logits; log-odds read all of them.
        mlps: Whether MLPs respond to the change.
    """
    blocks = forward(shape, width) - shape.unembed(width)
    runs = blocks + (width - first) * blocks // width + 2 * shape.unembed(1)
    through = sum((shape.n_layers - layer) * shape.mlp(1) for layer in range(shape.n_layers)) if mlps else 0
    own = 2 * shape.d_head * shape.d_model + 2 * shape.d_model * read
    changes = shape.n_heads * (through + shape.n_layers * own)
    return shape.n_layers * shape.n_heads * forward(shape, width) / (runs + changes)
