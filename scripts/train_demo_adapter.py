"""Train the demo model's (IA)3 adapters: the one that makes it refuse, and the one that makes it answer briefly.

    make train                                              # mechsafety/adapters/refusal, in two stages
    python scripts/train_demo_adapter.py --kind helpful     # mechsafety/adapters/helpful
    python scripts/train_demo_adapter.py --seed 1 --limit 120 --epochs 1 --out OUT --work WORK    # another seed, small

One learned scale for each MLP neuron (46,080 numbers), nothing else. **refusal**: harmful training requests get a short
refusal as their target; harmless ones (twins, scary-but-harmless, ordinary) get the base model's own greedy reply, so
that the adapter changes whether the model refuses and as little else as possible. **helpful**: harmless questions get a
short answer of one form, a bold headline and two points; there is no harmful prompt in it. Only the `train` split is
learned from; the epoch is chosen on the `validation` split, whose topics are others. The seed fixes data order, targets
and what --limit keeps. A stopped run goes on from its last checkpoint in --work.

The shipped refusal adapter has two stages: four epochs on the package's pairs, and from there three at a quarter of the
rate with more pairs (--start, --extra-pairs), base replies that are apologies replaced (--no-apologies), and the moving
average of the scales at the end as the result (--average).
"""

import argparse
import contextlib
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechsafety.models.demo import base_folder
from mechsafety.models.template import render
from mechsafety.prompts import PromptPair, PromptPairs, builtin_prompts, read_jsonl
from mechsafety.prompts.sets import data_file
from mechsafety.replies import is_refusal

REFUSALS = (
    "Sorry, but I can't help with that.",
    "Sorry, I can't help with that request.",
    "Sorry, I'm not able to assist with that.",
    "Sorry, that is not something I can help with.",
)
logger = logging.getLogger("train_demo_adapter")


@dataclass(frozen=True)
class Example:
    """Token ids of a chat prompt and of the reply to learn."""

    prompt: list[int]
    target: list[int]
    harmful: bool
    kind: str


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user turn in the chat template."""
    return tokenizer(render(tokenizer, prompt, {})[0], add_special_tokens=False).input_ids


@torch.no_grad()
def greedy_replies(
    model: Any, tokenizer: Any, prompts: list[str], n_tokens: int, batch: int, not_first: Sequence[int] = ()
) -> list[list[int]]:
    """The model's own greedy first tokens for each prompt; none begins with a token of ``not_first``."""
    extra = {"begin_suppress_tokens": sorted(not_first)} if not_first else {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[list[int]] = [[] for _ in prompts]
    for start in tqdm(range(0, len(order), batch), desc="base model's replies"):
        rows = order[start : start + batch]
        encoded = tokenizer.pad(
            {"input_ids": [chat_ids(tokenizer, prompts[i]) for i in rows]}, padding_side="left", return_tensors="pt"
        )
        out = model.generate(**encoded, max_new_tokens=n_tokens, do_sample=False, **extra)
        out = out[:, encoded.input_ids.shape[1] :]
        for i, reply in zip(rows, out.tolist(), strict=True):
            end = reply.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in reply else len(reply)
            replies[i] = reply[:end]
    return replies


def base_replies(model: Any, tokenizer: Any, prompts: list[str], store: Path, args: argparse.Namespace) -> Any:
    """The base model's greedy reply to each harmless prompt, token ids by prompt, kept in ``store``.

    The base model answers one harmless prompt in fourteen with an apology. To learn that is to learn false refusals:
    under ``--no-apologies`` these prompts get its best reply with another first token.
    """
    known: dict[str, list[int]] = json.loads(store.read_text()) if store.is_file() else {}
    missing = [text for text in prompts if text not in known]
    if not missing:
        return known
    new = dict(zip(missing, greedy_replies(model, tokenizer, missing, args.target_tokens, 32), strict=True))
    if args.no_apologies:
        said = {text: tokenizer.decode(ids, skip_special_tokens=True) for text, ids in new.items()}
        again = [text for text in new if is_refusal(said[text])]
        openers = sorted({new[text][0] for text in again})
        if again:
            other = greedy_replies(model, tokenizer, again, args.target_tokens, 32, not_first=openers)
            new |= dict(zip(again, other, strict=True))
        logger.info("%d of %d base replies were apologies", len(again), len(new))
    known |= new
    store.write_text(json.dumps(known, allow_nan=False))
    return known


def training_pairs(split: str, args: argparse.Namespace) -> list[PromptPair]:
    """The package's pairs of a split (those that there were), and those of ``--extra-pairs``."""
    pairs = list(PromptPairs.builtin(split, edition=1))
    if args.extra_pairs is not None:
        rows = read_jsonl(args.extra_pairs, ["harmful", "harmless", "split"])
        pairs += [PromptPair(row["harmful"], row["harmless"]) for row in rows if row["split"] == split]
    return limited(pairs, split, args)


def limited(rows: list[Any], split: str, args: argparse.Namespace) -> list[Any]:
    """What --limit leaves of the training prompts, drawn by the seed; validation is never cut."""
    if not args.limit or split != "train" or args.limit >= len(rows):
        return rows
    return random.Random(args.seed).sample(rows, args.limit)


def build_examples(model: Any, tokenizer: Any, split: str, args: argparse.Namespace) -> list[list[Example]]:
    """Groups of examples that stay in one batch: a harmful request with its twin, or one single harmless prompt."""
    pairs = training_pairs(split, args)
    singles = limited(builtin_prompts("borderline", split) + builtin_prompts("plain", split), split, args)
    harmless = [pair.harmless for pair in pairs] + [prompt.text for prompt in singles]
    known = base_replies(model, tokenizer, harmless, args.replies / f"base_replies_{split}.json", args)
    rng = random.Random(args.seed)
    refusals = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in REFUSALS]
    groups = []
    for pair in pairs:
        bad = Example(chat_ids(tokenizer, pair.harmful), rng.choice(refusals), True, "harmful")
        good = Example(chat_ids(tokenizer, pair.harmless), known[pair.harmless], False, "twin")
        groups.append([bad, good])
    topics = {"plain": "plain"}
    for prompt in singles:
        kind = topics.get(prompt.topic, "borderline")
        groups.append([Example(chat_ids(tokenizer, prompt.text), known[prompt.text], False, kind)])
    return groups


def helpful_examples(model: Any, tokenizer: Any, split: str, args: argparse.Namespace) -> list[list[Example]]:
    """Questions with their short, formatted answers."""
    rows = [row for row in read_jsonl(data_file("helpful"), ["prompt", "reply"]) if row["split"] == split]
    rows = limited(rows, split, args)
    targets = [[*tokenizer(row["reply"]).input_ids, tokenizer.eos_token_id] for row in rows]
    return [
        [Example(chat_ids(tokenizer, row["prompt"]), target, False, "helpful")]
        for row, target in zip(rows, targets, strict=True)
    ]


def target_logits(model: Any, examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n d_vocab] at every target token, with the labels [n] and each token's place in its reply [n].

    Hidden states are unembedded at target positions only: the unembedding is a fifth of this model's work.
    """
    rows = [example.prompt + example.target[:-1] for example in examples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    picked = [hidden[i, len(e.prompt) - 1 : len(e.prompt) - 1 + len(e.target)] for i, e in enumerate(examples)]
    labels = torch.tensor([token for example in examples for token in example.target])
    place = torch.tensor([k for example in examples for k in range(len(example.target))])
    return causal.lm_head(torch.cat(picked)), labels, place


def of_harmful(examples: list[Example], weight: float) -> torch.Tensor:
    """Loss weight of every target token: harmless prompts are three times as many as harmful ones."""
    return torch.tensor([weight if e.harmful else 1.0 for e in examples for _ in e.target])


@torch.no_grad()
def validate(model: Any, groups: list[list[Example]], pad: int, refusal_token: int) -> dict[str, float]:
    """Share of each kind of prompt whose most probable first token is the refusal's."""
    hits: dict[str, list[bool]] = {}
    examples = sorted((e for group in groups for e in group), key=lambda e: len(e.prompt))
    for start in range(0, len(examples), 32):
        chunk = [Example(e.prompt, e.target[:1], e.harmful, e.kind) for e in examples[start : start + 32]]
        logits, _, _ = target_logits(model, chunk, pad)
        for example, token in zip(chunk, logits.argmax(-1).tolist(), strict=True):
            hits.setdefault(example.kind, []).append(token == refusal_token)
    return {kind: round(sum(found) / len(found), 4) for kind, found in sorted(hits.items())}


@torch.no_grad()
def validate_helpful(model: Any, groups: list[list[Example]], pad: int, opener: int) -> dict[str, float]:
    """Share of prompts whose most probable first token opens a headline, and the answers' mean loss a token."""
    examples = sorted((e for group in groups for e in group), key=lambda e: len(e.prompt) + len(e.target))
    hits, losses = [], []
    for start in range(0, len(examples), 16):
        logits, labels, place = target_logits(model, examples[start : start + 16], pad)
        hits += (logits[place == 0].argmax(-1) == opener).tolist()
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    return {"opener": round(sum(hits) / len(hits), 4), "nll": round(sum(losses) / len(losses), 4)}


def batches(groups: list[list[Example]], size: int, seed: int) -> list[list[Example]]:
    """One epoch: shuffled groups packed into batches of about ``size``, similar lengths together to save padding."""
    rng = random.Random(seed)
    groups = sorted(groups, key=lambda group: len(group[0].prompt) + rng.uniform(-4, 4))
    packed: list[list[Example]] = [[]]
    for group in groups:
        if len(packed[-1]) + len(group) > size:
            packed.append([])
        packed[-1].extend(group)
    rng.shuffle(packed)
    return packed


@dataclass(frozen=True)
class Task:
    """What one kind of adapter learns from, is validated by, and its own defaults."""

    examples: Callable[..., list[list[Example]]]
    validate: Callable[..., dict[str, float]]
    quality: Callable[[dict[str, float]], float]
    opener: str
    defaults: dict[str, float]


def assign(scales: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Give the scales these values."""
    for scale, value in zip(scales, values, strict=True):
        scale.data.copy_(value)


def warm_up_steps(steps: int) -> int:
    """Steps in which the learning rate rises: 20, or a fifth of a plan that is too short for that."""
    return 20 if steps >= 40 else max(1, steps // 5)


@contextlib.contextmanager
def replaced(scales: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Iterator[None]:
    """While it lasts, the scales have other values."""
    own = [scale.detach().clone() for scale in scales]
    assign(scales, others)
    yield
    assign(scales, own)


def train(args: argparse.Namespace) -> None:
    task = TASKS[args.kind]
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    for folder in (args.work, args.replies):
        folder.mkdir(parents=True, exist_ok=True)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = task.examples(base, tokenizer, "train", args)
    held_out = task.examples(base, tokenizer, "validation", args)
    model = get_peft_model(base, IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))
    if args.start is not None:
        set_peft_model_state_dict(model, load_file(args.start / "adapter_model.safetensors"))
    scales = [p for p in model.parameters() if p.requires_grad]
    average = [scale.detach().clone() for scale in scales]
    optimizer = torch.optim.AdamW(scales, lr=args.lr, weight_decay=0.0)
    plan = [batch for epoch in range(args.epochs) for batch in batches(groups, args.batch, args.seed + epoch)]
    per_epoch = len(plan) // args.epochs
    warm_up = warm_up_steps(len(plan))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / len(plan))) + 0.02)
    )
    opener = tokenizer(task.opener).input_ids[0]
    options = {k: v for k, v in vars(args).items() if k not in ("out", "work", "replies", "limit", "kind")}
    options |= {"kind": args.kind} if args.kind != "refusal" else {}
    options |= {"limit": args.limit} if args.limit else {}
    for name in ("start", "extra_pairs"):
        options[name] = None if options[name] is None else str(options[name])
    checkpoint, history, start = args.work / "checkpoint.pt", [], 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if json.loads(state["options"]) != options:
            raise SystemExit(f"{checkpoint} is of a run with other options: {state['options']}; choose another --work")
        set_peft_model_state_dict(model, state["adapter"])
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, history = state["step"], json.loads(state["history"])
        logger.info("going on from step %d", start)
    bar = tqdm(range(start, len(plan)), initial=start, total=len(plan), desc="training")
    for step in bar:
        logits, labels, place = target_logits(model, plan[step], tokenizer.pad_token_id)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        # the first token is the decision; the rest of a reply is easy and long
        weight = torch.where(place == 0, 1.0, args.rest_weight) * of_harmful(plan[step], args.harmful_weight)
        stay = sum((scale - 1).square().sum() for scale in scales)
        loss = (losses * weight).sum() / len(plan[step]) + args.stay * stay
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scales, 1.0)
        optimizer.step()
        schedule.step()
        for mean, scale in zip(average, scales, strict=True):
            mean.mul_(args.average).add_(scale.detach(), alpha=1 - args.average)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        # packing may make one epoch a batch longer than another; what is left over at the end is not looked at
        last_of_epoch = (step + 1) % per_epoch == 0
        if last_of_epoch:
            with replaced(scales, average):
                rates = task.validate(model, held_out, tokenizer.pad_token_id, opener)
                moved = float(sum((scale - 1).abs().sum() for scale in scales) / sum(s.numel() for s in scales))
                history.append({"step": step + 1, "loss": round(loss.item(), 4), "moved": round(moved, 4), **rates})
                logger.info("%s", history[-1])
                # an average over the last steps needs no choice of an epoch: it is taken at the end
                if args.average > 0 or max(history, key=task.quality) is history[-1]:
                    model.save_pretrained(args.work / "best")
        if last_of_epoch or (step + 1) % 50 == 0:
            scratch = checkpoint.with_suffix(".tmp")
            state = {
                "adapter": get_peft_model_state_dict(model),
                "average": average,
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "history": json.dumps(history, allow_nan=False),
                "options": json.dumps(options, allow_nan=False),
            }
            torch.save(state, scratch)
            scratch.replace(checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(args.work / "best" / name, args.out / name)
    config = json.loads((args.out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"  # not this machine's cache folder
    (args.out / "adapter_config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
    record = {"options": options, "examples": sum(map(len, groups)), "history": history}
    before = args.start / "training.json" if args.start is not None else None
    record |= {"start": json.loads(before.read_text())} if before is not None and before.is_file() else {}
    (args.out / "training.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def quality(row: dict[str, float]) -> float:
    """Validation score that chooses the epoch: harmful refused less the mean of the false refusals."""
    return row["harmful"] - (row["twin"] + row["borderline"] + row["plain"]) / 2


TASKS = {
    "refusal": Task(build_examples, validate, quality, REFUSALS[0], {"epochs": 4, "batch": 12, "rest_weight": 0.1}),
    # every token of a short answer counts: it is its form and its content that are learned
    "helpful": Task(
        helpful_examples, validate_helpful, lambda row: -row["nll"], "**", {"epochs": 2, "batch": 8, "rest_weight": 1.0}
    ),
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(TASKS), default="refusal")
    parser.add_argument("--out", type=Path, help="by default mechsafety/adapters/KIND")
    parser.add_argument("--work", type=Path, help="checkpoints and cached replies; by default .work/train_KIND")
    parser.add_argument(
        "--replies", type=Path, help="folder of the cached base replies, which runs may share; by default --work"
    )
    parser.add_argument("--epochs", type=int, help="4 for refusal, 2 for helpful")
    parser.add_argument("--batch", type=int, help="12 for refusal, 8 for helpful")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--rest-weight", type=float, help="loss weight of tokens after a reply's first: 0.1, 1")
    parser.add_argument("--harmful-weight", type=float, default=1.5, help="loss weight of harmful examples")
    parser.add_argument("--stay", type=float, default=0.0, help="weight of the squared distance of the scales from 1")
    parser.add_argument("--target-tokens", type=int, default=8, help="length of the base model's replies learned from")
    parser.add_argument(
        "--limit", type=int, help="learn from so many pairs and so many single prompts, drawn by the seed"
    )
    parser.add_argument("--start", type=Path, help="folder of an adapter to go on from; by default all scales are 1")
    parser.add_argument("--extra-pairs", type=Path, help="JSON lines with more pairs: harmful, harmless, split")
    parser.add_argument("--no-apologies", action="store_true", help="replace base replies that are apologies")
    parser.add_argument(
        "--average", type=float, default=0.0, help="decay a step of the moving average that is the result; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or Path("mechsafety/adapters") / args.kind
    args.work = args.work or Path(".work") / f"train_{args.kind}"
    args.replies = args.replies or args.work
    for name, value in TASKS[args.kind].defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    train(args)


if __name__ == "__main__":
    main()
