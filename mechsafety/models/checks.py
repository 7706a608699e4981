"""Checks of every model at load; the error names the check that failed."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.models.engine import check_engine
from mechsafety.models.lens_model import LensModel
from mechsafety.models.placed import home
from mechsafety.models.rotary import row_by_row
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.models.template import render
from mechsafety.prompts import Spans, Tokens
from mechsafety.sites import Site, SiteKind

logger = logging.getLogger(__name__)

# prompts of different lengths under any tokenizer, so that padding is checked too
PROBES = ("What is two plus two?", "Name a colour that you like, and one that you do not like, please.")
# number of columns in checks that compare parts of a model with one another
SHORT = 8
# float64 is not tighter because Llama-like models compute norms and rotary angles in float32 whatever their dtype
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}
# in half precision the tolerance of logits grows with them from this size on: the same prompt in a padded batch moves
# the demo model's logits, of up to 28, by 0.55 in bfloat16
HALF_SIZE = {"float16": 8.0, "bfloat16": 8.0}


def reference_logits(model: Any, tokenizer: Any, template_options: Mapping[str, Any]) -> list[Tensor]:
    """Logits [pos d_vocab] of the untouched Hugging Face model on each probe alone, before it is wrapped.

    The model runs with eager attention, as the wrapped model does. Other kinds of attention differ from it by 1e-4,
    through rounding alone.

    Raises:
        MechsafetyError: The model cannot run a chat prompt, or its logits depend on later tokens.
    """
    device, kind = home(model), model.config._attn_implementation
    model.config.return_dict = True  # outputs are read by name
    row_by_row(model)  # otherwise "dynamic" rotary angles would be those of the longest probe so far
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            rows = [ids.to(device) for ids in probe_rows(tokenizer, template_options)]
            found = [model(ids).logits[0].float() for ids in rows]
            short = rows[0][:, :SHORT]
            ends = torch.cat([short[:, :-1], short[:, :1]], 1)  # another last token
            plain, other = model(torch.cat([short, ends])).logits[:, :-1].float()
    except MechsafetyError:
        raise
    except Exception as error:  # a model may raise anything; the user needs one line
        raise MechsafetyError(
            f"{type(model).__name__} itself cannot run a chat prompt ({_said(error)})",
            expected="a model that runs, and the tokenizer that belongs to it",
        ) from error
    finally:
        model.set_attn_implementation(kind)
    gap, size = float((other - plain).abs().max()), float(plain.abs().max())
    if gap > 1e-2 * size:  # rounding alone is far below, also in half precision
        raise MechsafetyError(
            f"{type(model).__name__} is no causal model: its logits change by {gap:.2g} with a later token",
            expected="a decoder that predicts the next token",
        )
    return found


def probe_rows(tokenizer: Any, template_options: Mapping[str, Any]) -> list[Tensor]:
    """Token ids [1 pos] of each chat prompt that models are compared on."""
    texts = [render(tokenizer, prompt, template_options)[0] for prompt in PROBES]
    return [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]


def check_start_token(tokenizer: Any, template_options: Mapping[str, Any]) -> None:
    """Refuse a chat prompt that begins with two start tokens.

    Start tokens at later places are allowed, because in some chat models (SmolLM2) they open every turn.

    Raises:
        MechsafetyError: The check failed.
    """
    text, start = render(tokenizer, PROBES[0], template_options)[0], tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if start is not None and ids[:2] == [start, start]:
        raise _fail("start token", "the rendered prompt begins with two start tokens")


def check_model(model: LensModel, reference: list[Tensor] | None) -> None:
    """Run all checks, and set ``model.shortcuts`` to the shortcuts that are exact on the model.

    Args:
        model: The model.
        reference: The Hugging Face model's logits on each probe alone; None takes TransformerLens' own forward.

    Raises:
        MechsafetyError: A check fails. The message names the first one that does.
    """
    tokens = model.tokenize([PROBES[0]])
    tolerance = TOLERANCE.get(model.dtype_name, 1e-4)
    if reference is None:
        rows = probe_rows(model.tokenizer, model.template_options)
        reference = [model.backend.plain_logits(ids.to(model.device)) for ids in rows]
    largest = max(float(logits.abs().max()) for logits in reference)
    growth = max(1.0, largest / HALF_SIZE.get(model.dtype_name, math.inf))
    near = tolerance * growth * model.backend.rounding
    with torch.no_grad():
        with _called(model, "logits"):
            _check_logits(model, tokens, reference[0], near)
        with _called(model, "padding"):
            _check_padding(model, reference, near)
        with _called(model, "sites"):
            acts = _check_sites(model, _beginning(tokens))
        with _called(model, "edits"):
            _check_edit(model, _beginning(tokens), near)
        with _called(model, "head outputs"):
            _check_head_outputs(model, acts, tolerance)
        with _called(model, "MLP"):
            _check_mlp(model, acts, tolerance)
        with _called(model, "final norm"):
            _check_final_norm(model, acts, tolerance)
        with _called(model, "forward engine"):
            model.shortcuts = _exact_shortcuts(model, tolerance * growth)


@contextmanager
def _called(model: LensModel, name: str) -> Iterator[None]:
    """Context of a check: an error in the code that TransformerLens runs becomes one line with the check's name."""
    try:
        yield
    except MechsafetyError:
        raise
    except Exception as error:
        raise _fail(name, f"{model.name} cannot be run this way ({_said(error)})") from error


def _beginning(tokens: Tokens) -> Tokens:
    """The first columns of one prompt, for checks that need no whole prompt, because each column costs time."""
    n = min(SHORT, tokens.ids.shape[1])
    return Tokens(tokens.ids[:, :n], tokens.mask[:, :n], (Spans((0, n), n),))


def _ends(tokens: Tokens) -> Tokens:
    """The last columns of two prompts, with padding before those of the first prompt."""
    width = min(SHORT + 4, tokens.ids.shape[1])
    mask = tokens.mask[:, -width:].clone()
    mask[0, :-SHORT] = False
    return Tokens(tokens.ids[:, -width:], mask, tuple(Spans((0, n), n) for n in mask.sum(1).tolist()))


def _said(error: Exception) -> str:
    """Kind and first line of another library's error."""
    return f"{type(error).__name__}: {first_line(error)}"


def _exact_shortcuts(model: LensModel, tolerance: float) -> Shortcuts:
    """The shortcuts that are measured to be exact on this model; a warning names every other shortcut."""
    tokens = _ends(model.tokenize(PROBES))
    if check_engine(model, tokens, Shortcuts()) <= tolerance:
        return Shortcuts()
    gap = check_engine(model, tokens, Shortcuts.none())
    if not gap <= tolerance:
        raise _fail(
            "forward engine",
            f"running on from stored activations is off by {gap:.2g} in the logits; tolerated is {tolerance:.2g}",
        )
    gaps = {name: check_engine(model, tokens, Shortcuts.only(name)) for name in Shortcuts().on}
    wrong = [name for name, gap in gaps.items() if not gap <= tolerance]
    left = Shortcuts().without(*wrong)
    if not check_engine(model, tokens, left) <= tolerance:  # each is exact alone, but not all together
        wrong, left = list(gaps), Shortcuts.none()
    for name in wrong:
        logger.warning(
            "%s runs without the shortcut %r, which is off by %.2g in its logits", model.name, name, gaps[name]
        )
    return left


def _fail(name: str, problem: str) -> MechsafetyError:
    return MechsafetyError(f"the load check '{name}' failed: {problem}", page="a-load-check-failed")


def _check_logits(model: LensModel, tokens: Tokens, reference: Tensor, tolerance: float) -> None:
    found = model.forward(tokens, keep=tokens.ids.shape[1])[0].float()
    if found.shape != reference.shape:
        raise _fail("logits", f"shape {tuple(found.shape)}, the Hugging Face model's is {tuple(reference.shape)}")
    gap, allowed = _gap(found, reference, tolerance)
    if not gap <= allowed:
        raise _fail(
            "logits", f"they differ from the Hugging Face model's by up to {gap:.2g}; tolerated is {allowed:.2g}"
        )


def _check_padding(model: LensModel, reference: list[Tensor], tolerance: float) -> None:
    found = model.forward(model.tokenize(PROBES))[:, -1].float()
    gap, allowed = _gap(found, torch.stack([logits[-1] for logits in reference]), tolerance)
    if not gap <= allowed:
        raise _fail(
            "padding",
            f"a prompt's logits differ by up to {gap:.2g} between a padded batch and the prompt alone; "
            f"tolerated is {allowed:.2g}",
        )


def _gap(found: Tensor, reference: Tensor, tolerance: float) -> tuple[float, float]:
    """Largest difference, and the tolerated one, which grows with the logits as rounding does."""
    return float((found - reference).abs().max()), tolerance * max(1.0, float(reference.abs().max()) / 50)


def _check_sites(model: LensModel, tokens: Tokens) -> dict[Site, Tensor]:
    """Check that every site exists and has its promised shape; return the activations for the later checks."""
    wanted = [Site(kind, layer) for layer in range(model.n_layers) for kind in expected_shapes(model, 1, 1)]
    ends = [Site(SiteKind.FINAL_NORM_IN), Site(SiteKind.FINAL_NORM_OUT)]
    try:
        acts = model.read(tokens, [*wanted, *ends])
    except KeyError as error:  # TransformerLens names the hook that is not there
        raise _fail("sites", str(error.args[0])) from None
    seen, width = {site: tuple(tensor.shape) for site, tensor in acts.items()}, tokens.ids.shape[1]
    for site in wanted:
        shape = expected_shapes(model, 1, width)[site.kind]
        if seen.get(site) != shape:
            found = "is missing" if site not in seen else f"has shape {seen[site]}, promised {shape}"
            raise _fail("sites", f"{site.kind.value} of layer {site.layer} {found}")
    return acts


def expected_shapes(model: LensModel, batch: int, pos: int) -> dict[SiteKind, tuple[int, ...]]:
    """The promised shape of each site kind."""
    stream = (batch, pos, model.d_model)
    heads, kv_heads = (batch, pos, model.n_heads, model.d_head), (batch, pos, model.n_kv_heads, model.d_head)
    # if attention and MLP read the same residual stream (GPT-NeoX), there is no stream between them
    middle = {} if model.parallel else {SiteKind.RESID_MID: stream}
    return {
        SiteKind.RESID_PRE: stream,
        **middle,
        SiteKind.RESID_POST: stream,
        SiteKind.ATTN_OUT: stream,
        SiteKind.MLP_OUT: stream,
        SiteKind.Q: heads,
        SiteKind.K: kv_heads,
        SiteKind.V: kv_heads,
        SiteKind.Z: heads,
        SiteKind.PATTERN: (batch, model.n_heads, pos, pos),
        **({} if model.experts else {SiteKind.NEURONS: (batch, pos, model.d_mlp)}),
    }


def _check_edit(model: LensModel, tokens: Tokens, tolerance: float) -> None:
    kinds = (SiteKind.Z, SiteKind.MLP_OUT, *([] if model.experts else [SiteKind.NEURONS]))
    # the prompt as it is, and once per edit: one forward, because a forward reads all weights
    copies = len(kinds) + 1
    rows = Tokens(tokens.ids.repeat(copies, 1), tokens.mask.repeat(copies, 1), tokens.spans * copies)

    def to_zero(row: int) -> Callable[[Tensor], Tensor]:
        def edit(tensor: Tensor) -> Tensor:
            out = tensor.clone()
            out[row] = 0
            return out

        return edit

    with model.hooks([(Site(kind, 0), to_zero(row)) for row, kind in enumerate(kinds, 1)]):
        edited = model.logits(rows)
    plain = model.logits(rows)
    # all rows are the same prompt; not equal to the last bit: a mixture of experts runs the tokens of all rows together
    for row in range(1, copies):
        gap, allowed = _gap(plain[row], plain[0], tolerance)
        if not gap <= allowed:
            raise _fail("edits", "an edit outlives its context")
    for row, kind in enumerate(kinds, 1):
        if not float((edited[row] - plain[row]).abs().max()) > 0:
            raise _fail("edits", f"setting {kind.value} of layer 0 to zero changes nothing")
    gap, allowed = _gap(edited[0], plain[0], tolerance)
    if not gap <= allowed:
        raise _fail("edits", "an edit reaches other prompts, or outlives its context")


def _check_head_outputs(model: LensModel, acts: Mapping[Site, Tensor], tolerance: float) -> None:
    layer = model.n_layers - 1
    z_site, out_site = Site(SiteKind.Z, layer), Site(SiteKind.ATTN_OUT, layer)
    out = einsum(acts[z_site], model.W_O(layer), "batch pos head d_head, head d_head d_model -> batch pos d_model")
    out = out + model.b_O(layer)
    for norm in model.backend.norms(layer, "ln1_post"):
        out = model.backend.norm_form(norm).frozen(out)(out)
    allowed = tolerance * _size(acts[out_site])
    gap = float((out - acts[out_site]).abs().max())
    if not gap <= allowed:
        raise _fail(
            "head outputs",
            f"z W_O summed over heads is off by {gap:.2g} from what attention writes; tolerated is {allowed:.2g}",
        )


def _check_final_norm(model: LensModel, acts: Mapping[Site, Tensor], tolerance: float) -> None:
    before, after = Site(SiteKind.FINAL_NORM_IN), Site(SiteKind.FINAL_NORM_OUT)
    resid, out = acts[before].float(), acts[after].float()
    gap, allowed = float((model.frozen_final_norm(resid)(resid) - out).abs().max()), tolerance * _size(out)
    if not gap <= allowed:
        raise _fail("final norm", f"its linear form at a frozen scale is off by {gap:.2g}; tolerated is {allowed:.2g}")


def _check_mlp(model: LensModel, acts: Mapping[Site, Tensor], tolerance: float) -> None:
    layer = model.n_layers - 1
    before, attn, mlp, after = (
        Site(kind, layer) for kind in (SiteKind.RESID_PRE, SiteKind.ATTN_OUT, SiteKind.MLP_OUT, SiteKind.RESID_POST)
    )
    middle = acts[before] + acts[attn]
    allowed = tolerance * _size(acts[after])
    gap = float((middle + acts[mlp] - acts[after]).abs().max())
    if not gap <= allowed:
        raise _fail(
            "residual sum",
            f"attention and MLP outputs are off by {gap:.2g} from what the block adds; tolerated is {allowed:.2g}",
        )
    out = model.mlp(layer, acts[before] if model.parallel else middle)
    if out.shape != acts[mlp].shape:  # some experts forget which tokens are of which prompt
        raise _fail("MLP", f"called alone it gives the shape {tuple(out.shape)} for {tuple(acts[mlp].shape)}")
    gap = float((out - acts[mlp]).abs().max())
    if not gap <= allowed:
        raise _fail("MLP", f"its norm and layers, called alone, are off by {gap:.2g}; tolerated is {allowed:.2g}")


def _size(tensor: Tensor) -> float:
    """The largest absolute value of a tensor, at least 1; rounding grows with it."""
    return max(1.0, float(tensor.abs().max()))
