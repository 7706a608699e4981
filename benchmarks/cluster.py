"""Work per second of 1 and 2 replicas of a Ray cluster, the serial share, and what an item costs besides its work.

Run it on an idle machine with at least two cores, with one thread per process::

    OMP_NUM_THREADS=1 python benchmarks/cluster.py --out cluster.json

The sweep is the exact patching of every head and MLP of the demo model on a few pairs; ``--tiny`` takes a tiny random
model, to see that the script works.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mechsafety as ms
from mechsafety.scale.items import Place, pack, unpack


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def tiny() -> tuple[ms.LensModel, ms.PromptPairs, ms.RefusalLogOdds]:
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("tests", "scripts")]
    import swept

    return swept.llama(), swept.pairs(), swept.METRIC


def demo(n_pairs: int) -> tuple[ms.LensModel, ms.PromptPairs, ms.RefusalLogOdds]:
    model = ms.load_model("demo")
    pairs = ms.PromptPairs.builtin().split("test").aligned(model).sample(n_pairs, 0)
    first = model.tokenizer("I", add_special_tokens=False).input_ids[0]
    return model, pairs, ms.RefusalLogOdds((first,), ("I",))


def per_item(folder: Path, n: int = 200) -> dict[str, float]:
    """Seconds per item of 4 kB: packing and checking it, and keeping it on disk."""
    value, place = torch.randn(32, 32), Place("run", "sweep", 0)
    packed = seconds(lambda: [unpack(torch.Tensor, pack(torch.Tensor, value, place), place) for _ in range(n)]) / n
    from mechsafety.output import output_file

    data = pack(torch.Tensor, value, place)

    def keep(k: int) -> None:
        with output_file(folder / f"{k}.safetensors") as scratch:
            scratch.write_bytes(data)

    return {"packed": packed, "kept": seconds(lambda: [keep(k) for k in range(n)]) / n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model, pairs, metric = tiny() if given.tiny else demo(given.pairs)

    def sweep() -> bytes:
        return ms.activation_patching(model, pairs, metric, progress=False).to_json().encode()

    alone = sweep()
    found: dict[str, object] = {"model": model.name, "pairs": len(pairs), "threads": torch.get_num_threads()}
    found["in_process"] = min(seconds(sweep) for _ in range(given.repeat))
    with tempfile.TemporaryDirectory() as place:
        found["per_item"] = per_item(Path(place))

        def kept(k: int) -> None:
            with ms.running(Path(place) / f"run{k}"):
                sweep()

        found["with_run_folder"] = min(seconds(lambda k=k: kept(k)) for k in range(given.repeat))
    for replicas in (1, 2):
        executor = ms.RayExecutor(replicas=replicas)

        def shared(executor: ms.RayExecutor = executor) -> None:
            with ms.running(executor=executor):
                assert sweep() == alone

        found[f"first_call_of_{replicas}"] = seconds(shared)  # starts the replicas and loads the model
        found[f"replicas_{replicas}"] = min(seconds(shared) for _ in range(given.repeat))
        executor.close()
    one, two = float(found["replicas_1"]), float(found["replicas_2"])
    found["speedup"] = one / two
    # Amdahl: two = one (serial + (1 - serial) / 2)
    found["serial_share"] = max(0.0, 2 * two / one - 1)
    text = json.dumps(found, indent=1, allow_nan=False)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
