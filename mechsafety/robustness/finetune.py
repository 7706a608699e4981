"""Targeted fine-tuning: training of chosen heads and neurons alone, to harden, repair or spread refusal."""

import hashlib
import math
import os
import random
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Prompts, Texts, prompt_list, public
from mechsafety.interventions import ablate
from mechsafety.models import LensModel
from mechsafety.models.slices import Slice, n_parameters, part_slices, replaced, whole_slices
from mechsafety.nodes import Node, NodeLike
from mechsafety.output import json_text
from mechsafety.progress import stages
from mechsafety.prompts import PromptPairs, distinct
from mechsafety.replies import (
    Judge,
    ask_judge,
    check_judge,
    check_unedited,
    judge_replies,
    loss_limit,
    phrase_judge,
    reply_loss,
)
from mechsafety.robustness.finetuned import (
    AFTER,
    BEFORE,
    LOADED,
    UNDAMAGED,
    ControlTraining,
    Outcome,
    PartsFineTuning,
    refuses_less,
)
from mechsafety.robustness.parts import matched_ranking, mean_values, ranked_parts
from mechsafety.robustness.training import (
    Example,
    FineTuneOptions,
    Head,
    History,
    Task,
    checkpoint_file,
    every_example,
    examples_of,
    train_slices,
)
from mechsafety.sites import Site

Objective = Literal["harden", "repair", "spread"]
Parts = RefusalCircuit | Sequence[NodeLike]
RANDOM, ALL, ABLATED = "random parts", "all parameters", ", parts ablated"
# without validation pairs, one in this many examples is kept for validation
KEPT = 5
# a text that is cut is another one's beginning if they share at least so many first words
SAME_WORDS = 3
# shares of the ablated parts under which validation prompts are read
SHARES = (0.0, 0.5, 1.0)


@public
def finetune_parts(
    model: LensModel,
    parts: Parts,
    examples: PromptPairs,
    objective: Objective,
    options: FineTuneOptions | None = None,
    *,
    test: PromptPairs,
    validation: PromptPairs | None = None,
    ordinary: Prompts = (),
    refusals: Texts | None = None,
    damage: Sequence[NodeLike] = (),
    ablated: Parts | None = None,
    controls: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    judge: Judge = phrase_judge,
    limit: float | None = None,
    progress: bool = True,
) -> PartsFineTuning:
    """Train chosen heads, neurons and MLPs alone, in memory, so that the model refuses better or again.

    Only the parts' own numbers move (see `mechsafety.models.slices.part_slices`); all others keep their bits. The model
    itself is unchanged afterwards: the new numbers are in the result. There is no objective that makes a model refuse
    less, and a result that does so cannot be saved.

    - ``harden``: the cross entropy of refusals of the harmful prompts, plus KL(untouched || trained) along the
      untouched model's replies to the harmless prompts.
    - ``repair``: with ``damage`` ablated, KL(undamaged || trained) along the undamaged model's replies to harmless
      prompts, and along its refusals of harmful ones. Harmful prompts that it does not refuse are left out.
    - ``spread``: as ``harden``, while a random subset of ``ablated`` is ablated at each step, of a size from none to
      all, so that refusal does not hang on them.

    AdamW (Loshchilov and Hutter 2019) has its state over the parts' numbers alone. The numbers with the smallest
    validation loss are kept; those before training are among them.

    Args:
        model: The model, without an open intervention.
        parts: What is trained: heads, neurons and MLPs, or a circuit.
        examples: Training pairs. They need not align.
        objective: ``harden``, ``repair`` or ``spread``.
        options: Step size, number of steps, lengths, seed; see `FineTuneOptions`.
        test: Pairs on which rates and side effects are measured. None of their prompts may be among the examples.
        validation: Pairs for early stopping. By default one in five of the examples, drawn by the seed.
        ordinary: Further harmless prompts whose replies are to be kept.
        refusals: Refusals to learn. By default the model's own: each harmful prompt learns the model's refusal of it,
            or, where it is not refused, a refusal of another one. The judge must call each of them a refusal, and none
            may be what the untouched model replies to a harmless prompt.
        damage: Parts that are ablated throughout (``repair``); none of them may be trained.
        ablated: Parts of which random ones are ablated at each step (``spread``); by default the trained ones.
        controls: Whether to train twice more with as many steps: random parts of the same kinds and layers
            (`matched_ranking`), and all parameters of the model at each of ``options.control_rates``. The latter takes
            memory for about ten float32 copies of the weights.
        checkpoint: A folder for checkpoints. A run that was stopped goes on from there, to the same bytes. The control
            on all parameters has none, since it would be a whole model. The checkpoint of numbers that make the model
            refuse less is deleted.
        judge: Decides what is a refusal (`mechsafety.judge_replies`). `mechsafety.replies.phrase_judge` is asked as
            well, and a result that refuses less to either of them cannot be saved.
        limit: Loss per token under the untouched model above which a reply is degenerate, in nats. By default
            `mechsafety.replies.loss_limit`.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: Parts that the model lacks, or of a mixture of experts; damage or ablated parts that the
            objective does not use or lacks; test prompts among the examples; no refusals to learn; replies longer than
            the model's positions; a model under an intervention; a loss that is not finite; or a checkpoint of another
            run.

    Example:
        >>> tuned = ms.robustness.finetune_parts(model, ["L3.MLP"], train, "harden", short, test=test)
        >>> tuned.to_dataframe().condition.tolist()
        ['before', 'after']
        >>> path = tuned.save_adapter(folder / "harden.safetensors")
    """
    check_unedited(model)
    check_judge(judge)
    model, options = model.reading(()), options or FineTuneOptions()
    run = _Run(model, objective, options, _damage(model, objective, damage), (), judge, progress)
    nodes = _trained(model, parts, run.damage)
    if refusals is not None and objective == "repair":
        raise MechsafetyError(
            "refusals for the objective 'repair'", expected="none: it learns those of the undamaged model"
        )
    spread = _ablated(model, objective, nodes, ablated)
    slices, shared = part_slices(model, nodes)
    train, look, test, extra = _sets(examples, validation, test, ordinary, options.seed)
    means = mean_values(model, [*run.damage, *spread], train.harmless) if options.source == "mean" else {}
    run = replace(run, ablated=spread, means=means)
    most = loss_limit(model) if limit is None else float(limit)
    with stages(2 + 2 * controls, progress) as stage:
        stage.begin("replies to learn from")
        task, without = run.task(train, look, extra, refusals)
        about = {
            "model": model.weights_sha256,
            "objective": objective,
            "options": asdict(options),
            "damage": [str(node) for node in run.damage],
            "ablated": [str(node) for node in spread],
            "examples": hashlib.sha256(json_text(list(every_example(task)), None).encode()).hexdigest(),
        }
        stage.begin(objective)
        values, history = train_slices(
            model,
            slices,
            task,
            options,
            checkpoint=checkpoint_file(checkpoint, "parts"),
            about=about,
            progress=progress,
        )
        references = model.generate(test.harmless, options.judged_tokens, progress=progress)
        meter = _Meter(run, test, references, model.logits(test.harmless), most)
        outcomes = meter.ends(slices, values)
        drawn: tuple[Node, ...] = ()
        trainings: list[ControlTraining] = []
        if controls:
            stage.begin(RANDOM)
            others = [node for node in (*run.damage, *spread) if node not in nodes]
            drawn = matched_ranking(model, [*nodes, *others], options.seed)[: len(nodes)]
            some = part_slices(model, drawn)[0]
            place = checkpoint_file(checkpoint, "random")
            found, seen = train_slices(model, some, task, options, checkpoint=place, about=about, progress=progress)
            trainings.append(_training(RANDOM, options, seen))
            outcomes += meter.after(RANDOM, sum(part.numel for part in some), some, found)
            stage.begin(ALL)
            every = whole_slices(model)
            found, tried = _all_parameters(model, every, task, options, progress)
            trainings += tried
            outcomes += meter.after(ALL, n_parameters(model), every, found)
            del found
    result = PartsFineTuning(
        model.provenance(seed=options.seed, options={**asdict(options), "test": len(test), "controls": controls}),
        objective,
        nodes,
        run.damage,
        spread,
        drawn,
        {name: value.cpu() for name, value in values.items()},
        shared,
        sum(part.numel for part in slices),
        n_parameters(model),
        torch.tensor(history.losses),
        torch.tensor(history.norms),
        tuple(history.looked),
        torch.tensor(history.validation),
        (sum(one.harmful for one in task.train), sum(not one.harmful for one in task.train)),
        without,
        tuple(outcomes),
        tuple(trainings),
    )
    _drop_checkpoints(result, checkpoint)
    return result


def _all_parameters(
    model: LensModel, every: Sequence[Slice], task: Task, options: FineTuneOptions, progress: bool
) -> tuple[dict[str, Tensor], list[ControlTraining]]:
    """The model's parameters trained at each rate of the control, and those with the smallest validation loss."""
    best, least, tried = dict[str, Tensor](), math.inf, list[ControlTraining]()
    for rate in options.control_rates:
        slower = replace(options, learning_rate=rate * options.learning_rate)
        found, seen = train_slices(model, every, task, slower, progress=progress)
        tried.append(_training(ALL, slower, seen))
        if tried[-1].after < least:
            best, least = found, tried[-1].after
    return best, tried


def _training(name: str, options: FineTuneOptions, seen: History) -> ControlTraining:
    losses = seen.validation
    return ControlTraining(name, options.learning_rate, seen.looked[seen.best], losses[0], losses[seen.best])


def _drop_checkpoints(result: PartsFineTuning, folder: str | os.PathLike[str] | None) -> None:
    """Delete the checkpoints of numbers that make the model refuse less."""
    names = {one.name for one in result.outcomes}
    before = result.outcome(BEFORE).refused()
    worse = RANDOM in names and any(map(refuses_less, before, result.outcome(RANDOM).refused()))
    for name, drop in (("parts", bool(result.lost())), ("random", worse)):
        place = checkpoint_file(folder, name)
        if place is not None and drop:
            place.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Run:
    """What is trained for, under which interventions."""

    model: LensModel
    objective: Objective
    options: FineTuneOptions
    damage: tuple[Node, ...]
    ablated: tuple[Node, ...]
    judge: Judge
    progress: bool
    means: dict[Site, Tensor] | None = None

    def without(self, nodes: Sequence[Node]) -> AbstractContextManager[Any]:
        """Context in which parts are ablated."""
        if not nodes:
            return nullcontext()
        return ablate(self.model, nodes, 1.0, self.options.source, values=self.means)

    def edits(self, rng: random.Random, share: float | None) -> AbstractContextManager[Any]:
        """Context of one step: the damage, or a random subset of the ablated parts, of a given or a random size."""
        if not self.ablated:
            return self.without(self.damage)
        most = len(self.ablated)
        return self.without(rng.sample(self.ablated, rng.randint(0, most) if share is None else round(share * most)))

    def task(
        self, train: PromptPairs, look: PromptPairs, extra: Sequence[str], refusals: Sequence[str] | None
    ) -> tuple[Task, int]:
        """What is learned, and how many harmful prompts were left out because they are not refused."""
        head, left = Head.of(self.model), 0
        sets: list[list[Example]] = []
        for pairs, more in ((train, list(extra)), (look, [])):
            harmless = distinct([*pairs.harmless, *more], "harmless prompts")
            said = self._replies(harmless)
            _check_no_answers(refusals or (), harmless, self.model.decode(said))
            found, lost = self._harmful(pairs.harmful, refusals)
            sets.append([*found, *examples_of(self.model, harmless, said, harmful=False, teach=True)])
            left += lost
        self._check_room([*sets[0], *sets[1]])
        shares = SHARES if self.ablated else (None,)
        return Task(sets[0], sets[1], head, self.edits, self.objective, shares), left

    def _harmful(self, prompts: Sequence[str], refusals: Sequence[str] | None) -> tuple[list[Example], int]:
        asked = distinct(prompts, "harmful prompts")
        rng = random.Random(f"{self.options.seed} refusals")
        if refusals is not None:
            pool = self._given(refusals, asked[0])
            said = [rng.choice(pool) for _ in asked]
            return examples_of(self.model, asked, said, harmful=True, teach=False), 0
        own = self._replies(asked)
        kinds = ask_judge(self.judge, asked, self.model.decode(own))
        refused = [reply for reply, kind in zip(own, kinds, strict=True) if kind == "refuses"]
        if not refused:
            raise MechsafetyError(
                f"{self.model.name} refuses none of the {len(asked)} harmful prompts",
                expected="refusals to learn",
                hint="give examples that it refuses" if self.objective == "repair" else "pass refusals=[...]",
            )
        if self.objective == "repair":
            kept = [k for k, kind in enumerate(kinds) if kind == "refuses"]
            taught = examples_of(self.model, [asked[k] for k in kept], [own[k] for k in kept], harmful=True, teach=True)
            return taught, len(asked) - len(kept)
        said = [reply if kind == "refuses" else rng.choice(refused) for reply, kind in zip(own, kinds, strict=True)]
        return examples_of(self.model, asked, said, harmful=True, teach=False), 0

    def _given(self, refusals: Sequence[str], prompt: str) -> list[list[int]]:
        """Token ids of the refusals that were given, each with an end token."""
        texts = list(refusals)
        kinds = ask_judge(self.judge, [prompt] * len(texts), texts)
        other = [text for text, kind in zip(texts, kinds, strict=True) if kind != "refuses"]
        if other or not texts:
            raise MechsafetyError(
                f"refusals={other[0][:40]!r} is no refusal to the judge" if other else "no refusals",
                expected="texts that refuse",
                hint="in another language, pass a judge that knows it",
            )
        tokenizer = self.model.tokenizer
        ends = list(self.model.end_ids[:1])
        if tokenizer.eos_token_id in self.model.end_ids:
            ends = [tokenizer.eos_token_id]
        return [[*tokenizer(text, add_special_tokens=False)["input_ids"], *ends] for text in texts]

    def _replies(self, prompts: Sequence[str]) -> list[list[int]]:
        return self.model.reply_ids(prompts, self.options.reply_tokens, progress=self.progress)

    def _check_room(self, examples: Sequence[Example]) -> None:
        room, longest = self.model.backend.sizes.n_ctx, max(len(e.prompt) + len(e.reply) for e in examples)
        if longest > room:
            raise MechsafetyError(
                f"a prompt and reply of {longest} tokens", expected=f"at most {room}", hint="give shorter refusals"
            )


def _check_no_answers(refusals: Sequence[str], prompts: Sequence[str], replies: Sequence[str]) -> None:
    """Refuse texts to learn that are the untouched model's replies to harmless prompts, whatever the judge calls them.

    Raises:
        MechsafetyError: One of them is, or begins as one does.
    """
    kinds = ask_judge(phrase_judge, prompts, replies)
    answers = [re.findall(r"\w+", text.lower()) for text, kind in zip(replies, kinds, strict=True) if kind != "refuses"]
    for text in refusals:
        words = re.findall(r"\w+", text.lower())
        for answer in answers:
            # replies are cut to their first tokens
            n = min(len(words), len(answer))
            if n and words[:n] == answer[:n] and (n >= SAME_WORDS or len(words) == len(answer)):
                raise MechsafetyError(
                    f"refusals={text[:40]!r} is what the model replies to a harmless prompt",
                    expected="texts that refuse",
                )


@dataclass(frozen=True, slots=True)
class _Meter:
    """Measures conditions on the test prompts."""

    run: _Run
    test: PromptPairs
    references: list[str]
    untouched: Tensor
    limit: float

    def ends(self, slices: Sequence[Slice], values: dict[str, Tensor]) -> list[Outcome]:
        """The model before and after training; for repair also without the damage."""
        n = sum(part.numel for part in slices)
        found = self.after(BEFORE, 0, (), {})
        found += self.after(AFTER, n, slices, values)
        if self.run.damage:
            found.insert(0, self.outcome(UNDAMAGED, 0, nullcontext))
            found.append(self.outcome(LOADED, n, lambda: replaced(self.run.model, slices, values)))
        return found

    def after(self, name: str, n: int, slices: Sequence[Slice], values: dict[str, Tensor]) -> list[Outcome]:
        """The model with new numbers, under the damage; for spread also with all of the ablated parts ablated."""
        conditions = [(name, self.run.damage)]
        conditions += [(name + ABLATED, self.run.ablated)] if self.run.ablated else []
        found = []
        for label, without in conditions:

            def context(without: Sequence[Node] = without) -> AbstractContextManager[Any]:
                stack = ExitStack()
                with stack:
                    stack.enter_context(replaced(self.run.model, slices, values))
                    stack.enter_context(self.run.without(without))
                    return stack.pop_all()

            found.append(self.outcome(label, n, context))
        return found

    def outcome(self, name: str, n: int, context: Callable[[], AbstractContextManager[Any]]) -> Outcome:
        """One condition; the replies are judged by the untouched model, and only their kinds are kept."""
        model, sides = self.run.model, (self.test.harmful, self.test.harmless)
        with context():
            said = [model.generate(side, self.run.options.judged_tokens, progress=False) for side in sides]
            after = model.logits(self.test.harmless)
            loss = reply_loss(model, self.test.harmless, self.references)
        kinds = [
            judge_replies(model, side, texts, judge=self.run.judge, limit=self.limit).without_text()
            for side, texts in zip(sides, said, strict=True)
        ]
        kl = next_token_kl(self.untouched, after).clamp(min=0).float().cpu()
        phrases = ask_judge(phrase_judge, self.test.harmful, said[0])
        return Outcome(name, n, kinds[0], kinds[1], kl, loss.float(), phrases)


def _trained(model: LensModel, parts: Parts, damage: Sequence[Node]) -> tuple[Node, ...]:
    """The parts to train; a neuron of an MLP that is trained as a whole is left out."""
    nodes = ranked_parts(model, parts)
    both = sorted({str(node) for node in nodes} & {str(node) for node in damage})
    inside = [str(node) for node in nodes if node.home in damage]
    inside += [str(node) for node in damage if node.home in nodes]
    if both or inside:
        raise MechsafetyError(
            f"{[*both, *inside][0]} is damaged and to be trained", expected="parts to train that are not damaged"
        )
    return tuple(node for node in nodes if node.kind != "neuron" or node.home not in nodes)


def _damage(model: LensModel, objective: Objective, damage: Sequence[NodeLike]) -> tuple[Node, ...]:
    if objective != "repair":
        if damage:
            raise MechsafetyError(
                f"damage for the objective {objective!r}",
                expected="damage for 'repair' alone",
                hint="'spread' takes ablated=[...]" if objective == "spread" else "",
            )
        return ()
    if not damage:
        raise MechsafetyError("repair without damage", expected="damage=[...], the parts that are ablated")
    return ranked_parts(model, damage)


def _ablated(
    model: LensModel, objective: Objective, trained: Sequence[Node], ablated: Parts | None
) -> tuple[Node, ...]:
    if objective != "spread":
        if ablated is not None:
            raise MechsafetyError(
                f"ablated parts for the objective {objective!r}",
                expected="ablated parts for 'spread' alone",
                hint="'repair' takes damage=[...]" if objective == "repair" else "",
            )
        return ()
    return tuple(trained) if ablated is None else ranked_parts(model, ablated)


def _sets(
    examples: PromptPairs, validation: PromptPairs | None, test: PromptPairs, ordinary: Prompts, seed: int
) -> tuple[PromptPairs, PromptPairs, PromptPairs, list[str]]:
    """Training, validation and test pairs, of which no prompt of the test is in another set."""
    if validation is None:
        if len(examples) < 2:
            raise MechsafetyError(
                "1 training pair", expected="at least 2, one of them for validation", hint="or pass validation=pairs"
            )
        places = random.Random(f"{seed} validation").sample(range(len(examples)), max(1, len(examples) // KEPT))
        rows = list(enumerate(examples))
        validation = replace(examples, pairs=tuple(pair for k, pair in rows if k in places))
        examples = replace(examples, pairs=tuple(pair for k, pair in rows if k not in places))
    extra = prompt_list(ordinary, "ordinary")
    learned = {*examples.harmful, *examples.harmless, *validation.harmful, *validation.harmless, *extra}
    again = [prompt for prompt in (*test.harmful, *test.harmless) if prompt in learned]
    if again:
        raise MechsafetyError(
            f"{len(again)} of the test's prompts are learned from, such as {again[0][:40]!r}",
            expected="test prompts that are not among the examples",
        )
    return examples, validation, test, extra
