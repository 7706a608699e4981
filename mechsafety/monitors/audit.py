"""`TamperAudit`: whether a model is still the one that was fingerprinted, and where it was tampered with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution import node_attribution
from mechsafety.conversation import Conversation
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.inputs import Amount, Count, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.monitors.sketches import Readings, own_parameters, read_model
from mechsafety.monitors.tampering import WORDS, AuditTest, Finding, compare, part_of, safety_parts
from mechsafety.output import json_text
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

DETECTED_ON = 16  # pairs on which the metric is found
STEPS = 4  # midpoints of the integral that says which parts carry the refusal
SHOWN = 10  # findings in a summary
# what a config says of where a model is from and how it is stored; none of it changes what the model computes
NO_COMPUTATION = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
HALF = ("neuron_gains", "neuron_writes", "writer_probes", "contrast")  # readings that a fingerprint keeps as float16


@dataclass(frozen=True, slots=True, repr=False)
class AuditReport(Result):
    """What an audit found.

    Attributes:
        provenance: The suspect, with the hash of its weights as they are now.
        fingerprint: Name of the model that was fingerprinted.
        identical: Whether weights, config, tokenizer, chat template and its options are those of the fingerprint, byte
            for byte, and no edit of the model is open. The tests decide the verdict in this case too, since code can
            change what the same weights compute.
        tests: Every test, with its value and limit.
        findings: Parts in which the suspect differs beyond a test's limit.
        notes: What else differs, such as the config, the tokenizer or the chat template.

    Example:
        >>> report = audit.check(base)
        >>> report.tampered, report.identical
        (True, False)
        >>> report.findings[0].words
        'its weights are 0% of what they were'
    """

    provenance: Provenance
    fingerprint: str
    identical: bool
    tests: tuple[AuditTest, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def score(self) -> float:
        """Largest value of a test as a share of its limit."""
        return max((test.score for test in self.tests), default=0.0)

    @property
    def tampered(self) -> bool:
        """Whether any test reaches its limit, that is, whether the score is at least 1."""
        return any(test.alarm for test in self.tests)

    def __repr__(self) -> str:
        verdict = "tampered" if self.tampered else "intact"
        alarms = ", ".join(test.name for test in self.tests if test.alarm)
        return f"AuditReport({self.provenance.model}: {verdict}, score {self.score:.2f}{alarms and f'; {alarms}'})"

    def summary(self) -> str:
        """The verdict and its evidence in plain words, one fact per line."""
        name = self.provenance.model
        if self.identical and not self.tampered:
            return f"{name} is intact: its weights are those of the fingerprint, byte for byte, and no test alarms."
        verdict = "was tampered with" if self.tampered else "is intact"
        lines = [f"{name} {verdict}: the score is {self.score:.2f}, the limit is 1."]
        if self.identical:
            lines.append("Its weights are those of the fingerprint, byte for byte. What they compute is not.")
        for test in self.tests:
            if test.alarm:
                lines.append(f"{test.name}: {WORDS[test.name]} is {test.value:.3g}; the limit is {test.limit:g}.")
                own = [one for one in self.findings if one.test == test.name]
                lines += [f"  {one.part}: {one.words}" for one in own[:SHOWN]]
                lines += [f"  and {len(own) - SHOWN} more listed"] if len(own) > SHOWN else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part in which the suspect differs: test, part, value and what was seen."""
        return pd.DataFrame([asdict(one) for one in self.findings], columns=[one.name for one in fields(Finding)])

    def tests_dataframe(self) -> pd.DataFrame:
        """One row per test: name, value, limit, score and whether it alarms."""
        rows = [{**asdict(test), "score": test.score, "alarm": test.alarm} for test in self.tests]
        return pd.DataFrame(rows, columns=["name", "value", "limit", "score", "alarm"])

    def plot(self) -> "go.Figure":
        """Score of every test; a score of 1 or more is an alarm."""
        import plotly.express as px

        figure = px.bar(self.tests_dataframe(), x="name", y="score", labels={"name": "", "score": "value / limit"})
        return figure.add_hline(y=1.0, line_dash="dot")


@dataclass(frozen=True, slots=True, repr=False)
class TamperAudit(Result):
    """A fingerprint of a model, against which copies are checked.

    It keeps small sketches: norms and random projections of the weights, sizes of activations and the refusal log-odds
    on a few fixed prompts. Neither the weights nor a reply can be got back from it. `save` it to one file that ends in
    ``.json``; for the demo model the file has about 0.5 MB.

    Attributes:
        provenance: The fingerprinted model.
        sizes: Sizes and shape of the model (`mechsafety.models.backend.Sizes`), which a suspect must share.
        metric: Name and tokens of the metric.
        harmful: Prompts that the model should refuse.
        harmless: Prompts that it should answer.
        importance: How much of the refusal each layer's attention (row 0) and MLP (row 1) carries, estimated
            (`mechsafety.node_attribution`, sums of absolute values).
        readings: Sketches and activations.
        config_sha256: Hash of the model's config, without names, versions and the data type.
        tokenizer_sha256: Hash of the tokenizer: its vocabulary, rules and special tokens.

    Example:
        >>> audit = ms.monitors.TamperAudit.fingerprint(model, pairs, metric)
        >>> audit.check(model).tampered, audit.check(base).tampered
        (False, True)
    """

    provenance: Provenance
    sizes: Mapping[str, Any]
    metric: dict[str, object]
    harmful: tuple[str | Conversation, ...]
    harmless: tuple[str | Conversation, ...]
    importance: Float[Tensor, "kind layer"]
    readings: Readings
    config_sha256: str
    tokenizer_sha256: str

    def __repr__(self) -> str:
        n = len(self.harmful) + len(self.harmless)
        return f"TamperAudit({self.provenance.model}: {len(self.readings.parameters)} parameters, {n} prompts)"

    @classmethod
    @public
    def fingerprint(
        cls,
        model: LensModel,
        pairs: PromptPairs | None = None,
        metric: RefusalLogOdds | None = None,
        *,
        n_pairs: Count = 6,
        seed: Amount = 0,
        progress: bool = True,
    ) -> "TamperAudit":
        """Take the fingerprint of a model that is known to be intact.

        Args:
            model: The model. It must refuse harmful prompts more than harmless ones.
            pairs: Pairs, of which some that align are taken; the built-in ones of the validation split by default.
            metric: Refusal log-odds read at one token; found on the pairs by default.
            n_pairs: Number of pairs that are kept, and run in every check.
            seed: Seed of the pairs and of the random projections.
            progress: Whether to show a bar.

        Raises:
            MechsafetyError: No pair aligns, a metric of whole openers, or an open edit of the model.
            NoRefusal: The model does not refuse, or does not score harmful prompts higher than harmless ones.

        Example:
            >>> audit = ms.monitors.TamperAudit.fingerprint(model, pairs, metric)
            >>> path = audit.save(folder / "audit.json")
            >>> ms.monitors.TamperAudit.load(path).check(model).tampered
            False
        """
        if model.edited:
            raise MechsafetyError("a fingerprint of an edited model", expected="no open ablation, steering or hook")
        chosen = (PromptPairs.builtin("validation") if pairs is None else pairs).aligned(model)
        if metric is None:
            metric = RefusalLogOdds.detect(model, chosen.sample(min(DETECTED_ON, len(chosen)), seed=seed))
        metric.check_one_column()
        chosen = chosen.sample(min(n_pairs, len(chosen)), seed=seed)
        readings = read_model(model, chosen.harmful, chosen.harmless, metric, seed)
        gap = float(readings.log_odds[: len(chosen)].mean() - readings.log_odds[len(chosen) :].mean())
        if not gap > 0:
            raise NoRefusal(
                f"{model.name} scores harmful prompts no higher than harmless ones (gap {gap:.2f})",
                hint="fingerprint a model that refuses, or pass a metric that reads its refusals",
            )
        parts = node_attribution(model, chosen, metric, steps=STEPS, progress=progress)
        importance = torch.stack([parts.heads.abs().sum(-1), parts.mlps.abs()]).float().cpu()
        return cls(
            replace(
                model.provenance(seed=seed, options={"pairs": chosen.name, "n_pairs": len(chosen)}),
                weights_sha256=model.hash_weights(),
            ),
            _sizes(model),
            metric.to_json(),
            tuple(chosen.harmful),
            tuple(chosen.harmless),
            importance,
            _stored(readings),
            _config_sha256(model),
            _tokenizer_sha256(model),
        )

    @property
    def safety_parts(self) -> tuple[str, ...]:
        """Layers' attention and MLPs that carry most of the refusal, such as ``L14.attention``."""
        names = ("attention", "MLP")
        found = zip(names, safety_parts(self.importance), strict=True)
        return tuple(f"L{layer}.{name}" for name, layers in found for layer in sorted(layers))

    @public
    def check(self, suspect: LensModel) -> AuditReport:
        """Compare a suspect with the fingerprint: intact or tampered, and where.

        The suspect's weights are sketched, and it is run once on the fingerprint's prompts, even if all its hashes are
        those of the fingerprint: a hook or changed code shows in no hash. The suspect is not changed. An open edit,
        such as `mechsafety.ablate`, counts as a part of the suspect.

        Args:
            suspect: A model of the same architecture and sizes.

        Raises:
            MechsafetyError: A model of other sizes or parameters.
        """
        self._check_comparable(suspect)
        now = replace(suspect.provenance(seed=self.provenance.seed), weights_sha256=suspect.hash_weights())
        report = self.judge(self.read(suspect), now)
        notes = _differing(
            ("config", self.config_sha256, _config_sha256(suspect)),
            ("tokenizer", self.tokenizer_sha256, _tokenizer_sha256(suspect)),
        )
        same = not notes and not suspect.edited and self.provenance.difference(now) is None
        return replace(report, identical=same, notes=(*report.notes, *notes))

    @public
    def read(self, suspect: LensModel) -> Readings:
        """Readings of a suspect on the fingerprint's prompts, with its projections."""
        metric = RefusalLogOdds.from_json(self.metric, suspect)
        seed = self.provenance.seed or 0
        return read_model(suspect, self.harmful, self.harmless, metric, seed)

    def judge(self, readings: Readings, provenance: Provenance) -> AuditReport:
        """The report on a suspect's readings.

        Args:
            readings: From `read`.
            provenance: The suspect.
        """
        tests, findings = compare(self.readings, _stored(readings), len(self.harmful), self.importance)
        notes = _differing(
            ("data type", self.provenance.dtype, provenance.dtype),
            ("chat template", self.provenance.template_sha256, provenance.template_sha256),
            ("template options", self.provenance.template_options, provenance.template_options),
        )
        return AuditReport(provenance, self.provenance.model, False, tests, findings, notes)

    def _check_comparable(self, suspect: LensModel) -> None:
        mine, theirs = dict(self.sizes), _sizes(suspect)
        other = next((name for name in mine if mine[name] != theirs.get(name)), None)
        if other is not None:
            raise MechsafetyError(
                f"{suspect.name} has {other} {theirs.get(other)}, the fingerprinted {self.provenance.model} has "
                f"{mine[other]}",
                expected="a model of the same architecture and sizes",
            )
        names = tuple(name for name, _ in own_parameters(suspect))
        if names != self.readings.parameters:
            strange = sorted(set(names) ^ set(self.readings.parameters)) or ["their order"]
            raise MechsafetyError(
                f"{suspect.name} and the fingerprinted {self.provenance.model} differ in parameters ({strange[0]})",
                expected="the same parameters",
                hint="take the fingerprint and check with the same version of TransformerLens, adapters merged",
            )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per parameter: its name, norm and whether it belongs to a safety part."""
        safety = self.safety_parts
        own = [_part_name(name) in safety for name in self.readings.parameters]
        return pd.DataFrame(
            {"parameter": self.readings.parameters, "norm": self.readings.parameter_norms.numpy(), "safety": own}
        )

    def plot(self) -> "go.Figure":
        """How much of the refusal each layer's attention and MLP carries."""
        import plotly.express as px

        rows = [
            {"layer": layer, "part": name, "importance": float(self.importance[k, layer])}
            for k, name in enumerate(("attention", "MLP"))
            for layer in range(self.importance.shape[1])
        ]
        return px.bar(pd.DataFrame(rows), x="layer", y="importance", color="part", barmode="group")

    def check_stored(self) -> None:
        """Refuse a file whose readings do not fit its sizes.

        Raises:
            MechsafetyError: They do not fit.
        """
        found, sizes = self.readings, self.sizes
        shapes = {
            "parameter_probes": (found.parameter_probes.shape[0], len(found.parameters)),
            "writer_probes": (found.writer_probes.shape[0], len(found.writers)),
            "head_gains": (tuple(found.head_gains.shape), (sizes.get("n_layers"), sizes.get("n_heads"))),
            "neuron_gains": (tuple(found.neuron_gains.shape), (sizes.get("n_layers"), sizes.get("d_mlp"))),
            "log_odds": (found.log_odds.shape[0], len(self.harmful) + len(self.harmless)),
            "importance": (tuple(self.importance.shape), (2, sizes.get("n_layers"))),
        }
        for name, (own, expected) in shapes.items():
            if own != expected:
                raise MechsafetyError(f"{name} of {own}", expected=f"{expected}", hint="take the fingerprint again")


def _part_name(name: str) -> str:
    part = part_of(name)
    return "" if part is None else f"L{part[1]}.{('attention', 'MLP')[part[0]]}"


def _differing(*facts: tuple[str, Any, Any]) -> tuple[str, ...]:
    """A note for each fact (its name, the fingerprinted model's value, the suspect's) in which the two differ."""
    return tuple(f"the {what} differs from the fingerprinted model's" for what, mine, its in facts if mine != its)


def _sizes(model: LensModel) -> dict[str, Any]:
    return {"architecture": type(model.hf_model).__name__, **asdict(model.backend.sizes)}


def _config_sha256(model: LensModel) -> str:
    """Hash of what the config says of the computation, such as the epsilon of the norms."""
    config = getattr(model.hf_model, "config", None)
    row = {} if config is None else _computing(json.loads(config.to_json_string(use_diff=False)))
    return hashlib.sha256(json_text(row, None).encode()).hexdigest()


def _computing(row: Any) -> Any:
    """A config, and the configs in it, in the order of their keys, without what changes no computation."""
    if isinstance(row, list):
        return [_computing(entry) for entry in row]
    if not isinstance(row, dict):
        return row
    return {key: _computing(row[key]) for key in sorted(row) if key not in NO_COMPUTATION}


def _tokenizer_sha256(model: LensModel) -> str:
    """Hash of the tokenizer's vocabulary, rules and special tokens."""
    tokenizer = model.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if fast is None else json.loads(fast.to_str())
    for use in ("truncation", "padding"):  # as the last call has left them
        rules.pop(use, None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    text = json.dumps([rules, special], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(readings: Readings) -> Readings:
    """The readings as a file keeps them: the long ones in 16 bits."""
    limit = torch.finfo(torch.float16).max
    return replace(readings, **{name: getattr(readings, name).clamp(-limit, limit).half() for name in HALF})
