"""Models larger than one device: the whole model's numbers to the last bit, with weights on disk or on meta."""

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload
from architectures import tiny_tokenizer
from tiny import tiny_hf_model, tiny_pairs

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import placed
from mechsafety.models.slices import part_slices, whole_slices
from mechsafety.monitors import sketches
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs
from mechsafety.scale.shipping import pack_weights

pytestmark = pytest.mark.generation("TransformerBridge", reason="HookedTransformer copies all weights to one device")

SOME = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
SOME |= {"model.layers.2": "disk", "model.norm": "disk", "lm_head": "disk"}


def save(kind, folder):
    tiny_hf_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def whole(folder):
    return ms.load_model(folder)


@pytest.fixture(scope="module")
def on_disk(folder):
    return ms.load_model(folder, device_map=SOME)


@pytest.fixture(scope="module")
def metric(whole):
    return ms.RefusalLogOdds.of(whole, ["sorry"])


def on_meta(folder):
    """All weights without numbers until their module runs; the numbers are in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return cpu_offload(model, execution_device=torch.device("cpu"))


def absent(model):
    return [name for name, tensor in model.hf_model.named_parameters() if tensor.is_meta]


def sketch(model, pairs, metric):
    return sketches.read_model(model, pairs.harmful, pairs.harmless, metric, 0)


# what is computed, by name
CALLS = {
    "logits": lambda m, pairs, metric: m.logits(pairs.harmful),
    "replies": lambda m, pairs, metric: torch.tensor([len(text) for text in m.generate(pairs.harmful, 6)]),
    "cache": lambda m, pairs, metric: m.cache(pairs.harmful, ["head_out"]).head_out,
    "patching": lambda m, pairs, metric: ms.activation_patching(m, pairs, metric, progress=False).changes,
    "paths, frozen": lambda m, pairs, metric: ms.path_patching(m, pairs, metric, mlp="freeze", progress=False).changes,
    "paths": lambda m, pairs, metric: ms.path_patching(m, pairs, metric, mlp="recompute", progress=False).changes,
    "gradients": lambda m, pairs, metric: ms.node_attribution(m, pairs, metric, progress=False).heads,
    "neurons": lambda m, pairs, metric: ms.node_attribution(m, pairs, metric, neurons=True, progress=False).neurons,
    "edges": lambda m, pairs, metric: ms.edge_attribution(m, pairs, metric, steps=1, progress=False).scores,
    "direct": lambda m, pairs, metric: ms.direct_logit_attribution(m, pairs, metric).heads,
    "sketch": lambda m, pairs, metric: (
        sketches.read_model(m, pairs.harmful, pairs.harmless, metric, 0).parameter_probes
    ),
    "written": lambda m, pairs, metric: sketches.read_model(m, pairs.harmful, pairs.harmless, metric, 0).writer_probes,
}


@pytest.mark.parametrize("name", CALLS)
def test_everything_is_equal_with_weights_on_disk(name, whole, on_disk, metric):
    call, pairs = CALLS[name], tiny_pairs()
    assert len(absent(on_disk)) == 20
    assert torch.equal(call(on_disk, pairs, metric), call(whole, pairs, metric))
    assert len(absent(on_disk)) == 20, "weights that were fetched stay in memory"


def test_the_hash_is_that_of_the_whole_model(whole, on_disk):
    assert on_disk.weights_sha256 == whole.weights_sha256
    assert on_disk.provenance().weights_sha256 == whole.provenance().weights_sha256
    assert on_disk.device == torch.device("cpu") and on_disk.shortcuts == whole.shortcuts


def test_batches_are_those_of_the_whole_model(whole, on_disk, monkeypatch):
    """Weights that are fetched during a run do not count as memory that a batch needs."""
    from mechsafety.models import memory

    monkeypatch.setattr(memory, "batch_bytes", lambda device: 2**20)
    whole_runs, runs = (pair_runs(model, tiny_pairs()).harmful for model in (whole, on_disk))
    assert runs.max_batch_tokens == whole_runs.max_batch_tokens < memory.CPU_TOKENS


@pytest.mark.parametrize("name", ["logits", "patching", "gradients", "direct", "paths"])
def test_everything_is_equal_with_all_weights_on_meta(name, folder, whole, metric):
    part = ms.load_model((on_meta(folder), tiny_tokenizer()))
    assert set(absent(part)) == {key for key, _ in part.hf_model.named_parameters()}
    assert part.weights_sha256 == whole.weights_sha256
    assert torch.equal(CALLS[name](part, tiny_pairs(), metric), CALLS[name](whole, tiny_pairs(), metric))


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gemma2"])
def test_other_architectures(kind, tmp_path):
    """Fused layers, tied embeddings, norms after attention."""
    folder, pairs = save(kind, tmp_path), tiny_pairs()
    whole, part = ms.load_model(folder), ms.load_model(folder, device_map={"": "disk"})
    metric = ms.RefusalLogOdds.of(whole, ["sorry"])
    assert len(absent(part)) > 15
    assert part.weights_sha256 == whole.weights_sha256
    for name in ("logits", "patching", "direct", *(["sketch"] if kind == "gemma2" else [])):
        assert torch.equal(CALLS[name](part, pairs, metric), CALLS[name](whole, pairs, metric)), name
    if kind != "gemma2":  # TransformerLens keeps the split queries, keys and values in memory
        said = refusal(lambda: CALLS["sketch"](part, pairs, metric))
        assert said.startswith("reading the weights of a model with fused layers with offloaded weights: ")


def test_auto_keeps_to_the_memory_that_is_given(folder, whole):
    part = ms.load_model(folder, device_map="auto", max_memory={"cpu": "60KB"})
    places = part.hf_model.hf_device_map
    held = sum(p.nbytes for p in part.hf_model.parameters() if not p.is_meta)
    assert "disk" in places.values() and 0 < held <= 60_000
    assert torch.equal(part.logits(["poison my tea"]), whole.logits(["poison my tea"]))
    assert absent(ms.load_model(folder, device_map="auto")) == []


def test_half_precision(folder):
    full, part = (ms.load_model(folder, dtype="bfloat16", **how) for how in ({}, {"device_map": SOME}))
    assert part.dtype == torch.bfloat16 and part.weights_sha256 == full.weights_sha256
    assert torch.equal(part.logits(["poison my tea"]), full.logits(["poison my tea"]))


def test_a_model_in_memory_is_placed(make_hf_model):
    # not the model from the file: where its weights lie in memory, a CPU's products round otherwise
    whole = ms.load_model((make_hf_model("llama"), tiny_tokenizer()))
    part = ms.load_model((make_hf_model("llama"), tiny_tokenizer()), device_map=SOME)
    assert len(absent(part)) == 20 and part.weights_sha256 == whole.weights_sha256
    assert torch.equal(part.logits(["poison my tea"]), whole.logits(["poison my tea"]))


def test_an_adapter_is_merged_before_the_weights_are_placed(folder, make_hf_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        make_hf_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    full, part = (
        ms.load_model((make_hf_model("llama"), tiny_tokenizer()), tmp_path, **how) for how in ({}, {"device_map": SOME})
    )
    assert len(absent(part)) == 20 and part.weights_sha256 == full.weights_sha256
    from_folder = ms.load_model(folder, tmp_path, device_map=SOME)
    assert len(absent(from_folder)) == 20 and from_folder.weights_sha256 == full.weights_sha256
    assert torch.equal(part.logits(["poison my tea"]), full.logits(["poison my tea"]))


def test_edits_by_hooks_work_and_leave_nothing(on_disk, whole):
    before = whole.logits(["poison my tea"])
    vector = torch.nn.functional.normalize(torch.arange(32.0), dim=0)
    edited = []
    for model in (on_disk, whole):
        with ms.interventions.project_out(model, vector):
            edited.append(model.logits(["poison my tea"]))
    assert torch.equal(*edited) and not torch.equal(edited[0], before)
    assert torch.equal(on_disk.logits(["poison my tea"]), before)


def test_temporary_folders_go_with_the_model(make_hf_model, tmp_path, monkeypatch):
    import gc
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    part = ms.load_model((make_hf_model("llama"), tiny_tokenizer()), device_map={"": "disk"})
    assert [path.name[:19] for path in tmp_path.iterdir()] == ["mechsafety-offload-"]
    del part
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_frequencies_of_rotary_embeddings_keep_their_precision(make_hf_model):
    model = ms.load_model((make_hf_model("llama"), tiny_tokenizer()), dtype="bfloat16")
    rotary = next(m for m in model.hf_model.modules() if "inv_freq" in m._buffers)
    assert rotary.inv_freq.dtype == torch.float32 and model.dtype == torch.bfloat16


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(call):
    with pytest.raises(MechsafetyError) as caught:
        call()
    return str(caught.value).splitlines()[0]


WHERE = "with offloaded weights: 20 tensors, such as lm_head.weight; expected all weights in memory; load the model "
WHERE += "without device_map, or with a map that offloads nothing"


def test_what_needs_all_weights_in_memory(on_disk):
    vector = torch.nn.functional.normalize(torch.arange(32.0), dim=0)

    def erase():
        with ms.interventions.orthogonalized(on_disk, vector):
            pass

    assert refusal(erase) == f"erasing directions from weights {WHERE}"
    said = refusal(lambda: part_slices(on_disk, [Node("head", 1, 0)]))
    assert said == f"reading and writing the weights of single parts {WHERE}"
    assert refusal(lambda: whole_slices(on_disk)) == f"reading and writing all weights {WHERE}"
    assert refusal(lambda: pack_weights(on_disk)) == f"sending a model in memory to other machines {WHERE}"
    assert len(absent(on_disk)) == 20


def test_a_map_that_cannot_be(folder, make_hf_model):
    def load(**options):
        return refusal(lambda: ms.load_model(folder, **options))

    assert load(max_memory={"cpu": "1GB"}) == "max_memory without device_map; pass device_map='auto' with max_memory"
    assert load(offload_folder="x").startswith("offload_folder without device_map")
    assert load(device_map="auto", device="cpu").startswith("device='cpu' together with device_map; expected one of")
    assert load(device_map="cuda:0") == (
        f"device_map='cuda:0'; expected one of {placed.STRATEGIES}, or a mapping from module names to devices; "
        "device='cuda:0' puts the whole model there"
    )
    assert load(device_map=[1]).startswith("device_map of type list; expected one of")
    assert load(device_map={"": "moon"}).startswith("device_map['']: unknown or unavailable device 'moon'; expected")
    assert load(device_map={"": 99}).startswith("device_map['']: unknown or unavailable device 99; expected one of")
    assert load(device_map="auto", max_memory={"cpu": "lots"}).startswith("max_memory['cpu']='lots'; expected a map")
    assert load(device_map="auto", max_memory={"moon": 1}).startswith("max_memory: unknown or unavailable device")
    dispatched = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=SOME)
    both = (dispatched, tiny_tokenizer())
    assert refusal(lambda: ms.load_model(both, device_map="auto")).startswith("device_map for a model that is wrapped")
    assert refusal(lambda: ms.load_model(both, dtype="bfloat16")) == (
        "dtype='bfloat16' for a model that is placed by accelerate or quantised; expected no dtype; give dtype where "
        "it is loaded, or leave it out"
    )


def test_weights_that_are_offloaded_and_no_numbers(tmp_path, make_hf_model):
    model = make_hf_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = np.nan
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert refusal(lambda: ms.load_model(tmp_path, device_map=SOME)).startswith(
        "weights that are NaN or infinite: 1 tensor, model.layers.0.mlp.up_proj.weight"
    )


@pytest.mark.parametrize("given", ["0", "cpu=", "=1GB"])
def test_the_commands_option(given):
    from mechsafety.cli import _max_memory

    assert refusal(lambda: _max_memory((given,))) == (
        f"--max-memory {given!r}; expected DEVICE=SIZE, such as 0=20GiB or cpu=60GiB"
    )
    assert _max_memory(("0=20GiB", "cpu=1GB")) == {0: "20GiB", "cpu": "1GB"} and _max_memory(()) is None
