"""Train the certified model of `mechsafety.testbed.certified`: nodes first, then edges, then single ones.

    python scripts/train_certified_model.py --out mechsafety/testbed/data/certified

The loss (Gupta et al. 2024, InterpBench, with an edge term besides) sums the task; interchange of each aligned node,
whose target is the causal model's answer with that variable from the other prompt; resampling of everything that is no
part of the circuit, whose target stays; in the second stage, resampling of every direct path that is no part of it; and
in the third, swaps of single paths: without it a path beside the declared one can carry the same, and be cancelled only
when all are resampled together (after two stages, one such path carried 96 % of the policy's effect).
The seed fixes the weights and all draws. A stopped run goes on from its last checkpoint in --work, to the same bytes.
"""

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.testbed.causal import BORDERLINE, refusal_model
from mechsafety.testbed.certify import (
    answer_ids,
    carried_by,
    certificate_json,
    certify,
    every_prompt,
    is_held_out,
    prompt_ids,
    single_edge_mask,
    swapped_edges,
    swapped_nodes,
    tokenizer,
    untrained_model,
    values,
)
from mechsafety.testbed.split import edge_mask, possible_edges, split_forward
from mechsafety.testbed.vocabulary import COMPLIANCE, REFUSAL

logger = logging.getLogger("train_certified_model")


def reply_rows(ids: Tensor, refused: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts with the reply that belongs to each, and where the words after its first one are predicted."""
    replies = [tokenizer().convert_tokens_to_ids(list(reply)) for reply in (COMPLIANCE, REFUSAL)]
    width = max(map(len, replies))
    padded = torch.tensor([reply + [0] * (width - len(reply)) for reply in replies])
    labels = torch.tensor([reply[1:] + [-100] * (width - len(reply)) for reply in replies])
    return torch.cat([ids, padded[refused][:, :-1]], dim=1), labels[refused]


def train(args: argparse.Namespace) -> None:
    torch.use_deterministic_algorithms(True)
    args.work.mkdir(parents=True, exist_ok=True)
    causal_model, model = refusal_model(), untrained_model(args.seed)
    every = every_prompt()
    seen = [prompt for prompt in every if not is_held_out(prompt)]
    fresh = [prompt for prompt in every if is_held_out(prompt)]
    ids, inputs = prompt_ids(seen), values(seen)
    # borderline requests are the ones on which context and policy decide
    weights = torch.where(inputs["severity"] == BORDERLINE, 3.0, 1.0)
    length, config = ids.shape[1], model.config
    outside, paths = swapped_nodes(config, causal_model, length), swapped_edges(config, causal_model, length)
    single = {v.name: swapped_nodes(config, causal_model, length, [v.name]) for v in causal_model.variables}
    answer = torch.tensor(answer_ids())
    stages = (args.node_steps, args.edge_steps, args.single_steps)
    total = sum(stages)
    circuit = causal_model.truth().edges
    possible = edge_mask(config, possible_edges(config))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    def rate(step: int) -> float:
        # each stage warms up and cools down by itself: it brings a new loss
        for size in stages:
            if step < size:
                return min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / size)) + 0.02)
            step -= size
        return 0.02

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    options = {k: v for k, v in vars(args).items() if k not in ("out", "work")}
    checkpoint, history, start = args.work / "checkpoint.pt", [], 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if json.loads(state["options"]) != options:
            raise SystemExit(f"{checkpoint} is of a run with other options: {state['options']}; choose another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, history = state["step"], json.loads(state["history"])
        logger.info("going on from step %d", start)

    def loss_of(run: Any, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(run.logits[:, -1], answer[target])

    for step in tqdm(range(start, total), initial=start, total=total, desc="training"):
        # a generator a step, so that a run that goes on draws what a run in one piece would
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        base, other = torch.multinomial(weights, 2 * args.batch, True, generator=generator).chunk(2)
        mine = {name: value[base] for name, value in inputs.items()}
        theirs = {name: value[other] for name, value in inputs.items()}
        expected, elsewhere = causal_model.run(mine), causal_model.run(theirs)
        plain = split_forward(model, ids[base])
        source = split_forward(model, ids[other]).senders
        loss = loss_of(plain, expected["produce"])
        # two variables a step: all six would triple its cost
        for k in torch.randperm(len(causal_model.variables), generator=generator)[:2].tolist():
            name = causal_model.variables[k].name
            changed = causal_model.run(mine, {name: elsewhere[name]})["produce"]
            loss = loss + loss_of(split_forward(model, ids[base], source, single[name]), changed)
        strict = loss_of(split_forward(model, ids[base], source, outside), expected["produce"])
        loss = loss + args.strict_weight * strict
        if step >= args.node_steps:
            # sometimes all paths, sometimes a random half of them: none may matter in any company
            drawn = torch.rand(paths.shape[:2], generator=generator) < (1.0 if step % 2 else 0.5)
            mask = paths & drawn[:, :, None]
            loss = loss + args.edge_weight * loss_of(split_forward(model, ids[base], source, mask), expected["produce"])
        if step >= args.node_steps + args.edge_steps:
            # a handful of the paths outside the circuit, often one; and two of the circuit's, each alone
            share = 10 ** (-2.5 * float(torch.rand((), generator=generator)))
            mask = paths & (possible & (torch.rand(paths.shape[:2], generator=generator) < share))[:, :, None]
            loss = loss + args.edge_weight * loss_of(split_forward(model, ids[base], source, mask), expected["produce"])
            for k in torch.randperm(len(circuit), generator=generator)[:2].tolist():
                name = carried_by(causal_model, circuit[k])
                changed = causal_model.run(mine, {name: elsewhere[name]})["produce"]
                mask = single_edge_mask(config, circuit[k], length)
                loss = loss + loss_of(split_forward(model, ids[base], source, mask), changed)
        rows, labels = reply_rows(ids[base[:32]], expected["produce"][:32])
        replied = split_forward(model, rows).logits[:, length:]
        loss = loss + args.reply_weight * torch.nn.functional.cross_entropy(
            replied.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == total:
            found = certify(model, causal_model, fresh[:: args.check_every], n_single=24, seed=1)
            row = {"accuracy": found.accuracy, **found.interchange, "strict": found.strict, "edges": found.edges_only}
            row |= {"edge_interchange": min(found.edge_interchange.values()), "single_edge": found.single_edge}
            history.append({"step": step + 1, "loss": loss.item()} | row)
            logger.info("%s", json.dumps({key: round(value, 4) for key, value in history[-1].items()}, allow_nan=False))
            scratch = checkpoint.with_suffix(".tmp")
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "history": json.dumps(history, allow_nan=False),
                "options": json.dumps(options, allow_nan=False),
            }
            torch.save(state, scratch)
            scratch.replace(checkpoint)
    certificate = certify(model, causal_model, fresh)
    logger.info("%s, every figure at least 0.99: %s", certificate, certificate.holds)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, args.out / "model.safetensors")
    training = {"options": options, "train_prompts": len(seen), "history": history}
    (args.out / "certificate.json").write_text(certificate_json(certificate, training), encoding="utf-8")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mechsafety/testbed/data/certified"))
    parser.add_argument("--work", type=Path, default=Path(".work/train_certified"), help="checkpoint of a stopped run")
    parser.add_argument("--node-steps", type=int, default=500)
    parser.add_argument("--edge-steps", type=int, default=1000)
    parser.add_argument("--single-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--strict-weight", type=float, default=0.4)
    parser.add_argument("--edge-weight", type=float, default=1.0)
    parser.add_argument("--reply-weight", type=float, default=0.2)
    parser.add_argument(
        "--check-every", type=int, default=8, help="held-out prompts measured while training: 1 in this"
    )
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
