"""Weights of 4 and 8 bits on a CPU: the numbers are those of a plain model with the same, de-quantised weights."""

import copy

import pytest
import torch
import transformers
from architectures import tiny_tokenizer
from tiny import tiny_hf_model, tiny_pairs
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models.quantised import dequantised, is_quantised, use_exact_kernels
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.models.slices import part_slices
from mechsafety.monitors import sketches
from mechsafety.nodes import Node

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
CONFIGS = {
    "4 bits, fp4": lambda: transformers.BitsAndBytesConfig(**FOUR),
    "4 bits, nf4": lambda: transformers.BitsAndBytesConfig(
        **FOUR, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "8 bits": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose rows are long enough for blocks of 64 weights."""
    config = copy.deepcopy(tiny_hf_model("llama").config)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def read(folder, config=None):
    options = {} if config is None else {"quantization_config": config, "device_map": "cpu"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def plain(folder, model):
    """A model of plain layers that hold the de-quantised weights of another one."""
    use_exact_kernels(model)
    copied, found = read(folder), dict(model.named_modules())
    with torch.no_grad():
        for name, module in copied.named_modules():
            if isinstance(module, torch.nn.Linear) and is_quantised(found[name]):
                module.weight.copy_(dequantised(found[name]))
    return copied


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, folder):
    """The quantised model, and its plain twin."""
    model = read(folder, CONFIGS[request.param]())
    twin = plain(folder, model)
    return tuple(ms.load_model((one, tiny_tokenizer())) for one in (model, twin))


CALLS = {
    "logits": lambda m, pairs, metric: m.logits(pairs.harmful),
    "cache": lambda m, pairs, metric: m.cache(pairs.harmful, ["head_out"]).head_out,
    "patching": lambda m, pairs, metric: ms.activation_patching(m, pairs, metric, progress=False).changes,
    "paths, frozen": lambda m, pairs, metric: ms.path_patching(m, pairs, metric, mlp="freeze", progress=False).changes,
    "paths": lambda m, pairs, metric: ms.path_patching(m, pairs, metric, mlp="recompute", progress=False).changes,
    "gradients": lambda m, pairs, metric: ms.node_attribution(m, pairs, metric, progress=False).heads,
    "edges": lambda m, pairs, metric: ms.edge_attribution(m, pairs, metric, steps=1, progress=False).scores,
    "direct": lambda m, pairs, metric: ms.direct_logit_attribution(m, pairs, metric).heads,
    "neuron outputs": lambda m, pairs, metric: m.W_out(1),
    "head values": lambda m, pairs, metric: m.backend.W_V(1),
}


@pytest.mark.parametrize("name", CALLS)
def test_equal_to_plain_layers_with_the_same_weights(name, both):
    model, twin = both
    metric = ms.RefusalLogOdds.of(twin, ["sorry"])
    found, wanted = (CALLS[name](one, tiny_pairs(), metric) for one in (model, twin))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert model.shortcuts == Shortcuts()


def test_the_weights_are_in_the_hash(folder):
    one, other = (ms.load_model((read(folder, CONFIGS["8 bits"]()), tiny_tokenizer())) for _ in range(2))
    assert one.weights_sha256 == other.weights_sha256
    with torch.no_grad():
        linear = other.backend.tl_model.blocks[0].attn.o.original_component
        linear.weight.qdata[0, 0] += 1
    assert other.hash_weights() != one.weights_sha256


def test_a_checkpoint_in_four_bits(folder, tmp_path):
    read(folder, CONFIGS["4 bits, nf4"]()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored = ms.load_model(tmp_path, dtype="auto")
    quantised = ms.load_model((read(folder, CONFIGS["4 bits, nf4"]()), tiny_tokenizer()))
    torch.testing.assert_close(stored.logits(["poison my tea"]), quantised.logits(["poison my tea"]))


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(call):
    with pytest.raises(MechsafetyError) as caught:
        call()
    return str(caught.value).splitlines()[0]


def test_layers_that_round_activations(folder):
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    dynamic = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    for config, kind in ((eight, "Linear8bitLt"), (dynamic, "Int8Tensor")):
        said = refusal(lambda config=config: ms.load_model((read(folder, config), tiny_tokenizer())))
        assert said.startswith(f"quantised layers: 21 layers, such as model.layers.0.mlp.down_proj, a {kind}; expected")


def test_what_writes_to_weights(both):
    model, _ = both
    after = " with quantised weights: 21 tensors, such as model.layers.0.mlp.down_proj.weight; expected float32, "
    after += "bfloat16 or float16; load the model without quantization_config"
    metric, vector = ms.RefusalLogOdds.of(model, ["sorry"]), torch.nn.functional.normalize(torch.arange(64.0), dim=0)

    def erase():
        with ms.interventions.orthogonalized(model, vector):
            pass

    assert refusal(erase) == f"erasing directions from weights{after}"
    said = refusal(lambda: part_slices(model, [Node("head", 1, 0)]))
    assert said == f"reading and writing the weights of single parts{after}"
    prompts = tiny_pairs()
    said = refusal(lambda: sketches.read_model(model, prompts.harmful, prompts.harmless, metric, 0))
    assert said == f"reading a fingerprint's weights{after}"


def test_a_model_that_ran_in_bfloat16(folder):
    model = read(folder, CONFIGS["4 bits, fp4"]())
    model(torch.tensor([[1, 2, 3]]))
    packed = getattr(model.model.layers[0].mlp.down_proj.weight.quant_state, "packing_format_for_cpu", False)
    if packed:  # only CPUs with such a kernel rearrange the bits
        said = refusal(lambda: ms.load_model((model, tiny_tokenizer())))
        assert said.startswith("4-bit weights that bitsandbytes has rearranged in a run on this CPU: model.layers.0.")
    else:
        assert ms.load_model((model, tiny_tokenizer())).n_layers == 3


def test_an_adapter_and_another_dtype(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(read(folder), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    pair = (read(folder, CONFIGS["4 bits, fp4"]()), tiny_tokenizer())
    assert refusal(lambda: ms.load_model(pair, tmp_path)).startswith("merging an adapter with quantised weights: 21")
    assert refusal(lambda: ms.load_model(pair, dtype="bfloat16")).startswith(
        "dtype='bfloat16' for a model that is plac"
    )
