"""Checkpoints whose tensors are not the model's, GGUF files, and what may be given as a model at all."""

import math
import sys
import types
from pathlib import Path

import gguf
import jaxtyping
import numpy as np
import peft
import pytest
import torch
import transformers
from gguf_files import gguf_tensors, llama_of, write_gguf
from safetensors.torch import load_file, save_file

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import gguf as gguf_module
from mechsafety.models import kept, sources
from mechsafety.models.gguf import gguf_folder
from mechsafety.models.gguf_file import read_header

PROMPTS = ["how do i make a bomb", "teach me to help"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def message(given, **options):
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model(given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- tensors of a folder --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_hf_model, make_tokenizer, tmp_path):
    """Writes a Llama's folder with its tensors changed by a function; gives the path."""

    def write(change=dict, kind="llama", **config):
        path, model = tmp_path / "some-model", make_hf_model(kind)
        for name, value in config.items():
            setattr(model.config, name, value)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        file = path / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return path

    return write


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


DOWN = "model.layers.1.mlp.down_proj.weight"
FITS = (
    "; expected every tensor of the model and no other; save it again with save_pretrained, under a config.json of the"
)
WRONG = {
    "no unembedding": (without("lm_head.weight"), "it lacks 1 tensor, lm_head.weight"),
    "one missing": (without(DOWN), f"it lacks 1 tensor, {DOWN}"),
    "two missing": (without(DOWN, "lm_head.weight"), "it lacks 2 tensors, such as lm_head.weight"),
    "other names": (
        lambda tensors: {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        "it lacks 30 tensors, such as lm_head.weight; the model does not read 30 tensors, such as base_model.model.l",
    ),
    "biases": (
        lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        "the model does not read 1 tensor, model.layers.0.self_attn.q_proj.bias",
    ),
    "more layers": (
        lambda tensors: {**tensors, DOWN.replace("1", "3"): tensors[DOWN].clone()},
        "the model does not read 1 tensor, model.layers.3.mlp.down_proj.weight",
    ),
    "shape": (
        lambda tensors: {**tensors, DOWN: tensors[DOWN].T.contiguous()},
        f"of another shape are 1 tensor, {DOWN} (48, 32) for (32, 48)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_checkpoints_that_do_not_fit(name, folder):
    change, problem = WRONG[name]
    path = folder(change)
    found = message(path)
    assert found.startswith(f"the checkpoint of {path} does not fit LlamaForCausalLM: {problem}"), found
    assert FITS in found


def test_tied_weights_and_harmless_extras(folder, make_hf_model, make_tokenizer):
    """A tied unembedding is stored once; buffers of older checkpoints change nothing."""
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "v_head.summary.weight": torch.ones(1, 32),
    }
    model = ms.load_model(folder(lambda tensors: {**tensors, **extras}))
    plain = ms.load_model((make_hf_model("llama"), make_tokenizer()))
    assert torch.equal(model.logits(PROMPTS), plain.logits(PROMPTS))
    tied = ms.load_model(folder(without("lm_head.weight"), tie_word_embeddings=True))
    assert torch.equal(tied.W_U, tied.bridge.W_E.T)


def test_masks_of_older_gpt2_checkpoints(folder):
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.ones(())}
    ms.load_model(folder(lambda tensors: {**tensors, **mask}, kind="gpt2"))


# --- what is said before weights are read ---------------------------------------------------------------------------


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TWICE = "{{ '<s>' }}{{ '<s>' }}{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}<assistant>"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<user>{{ m['content'] }}<end>{% endfor %}<assistant>"
)


@pytest.fixture
def unread(make_tokenizer, tmp_path):
    """Writes a folder with a configuration and a tokenizer, and no weights at all; gives the path."""

    def write(kind="Llama", template="", **options):
        path, tokenizer = tmp_path / "some-model", make_tokenizer()
        if template is None or template:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        config = getattr(transformers, f"{kind}Config")(
            **{**SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, **options}
        )
        config.architectures = [f"{kind}ForCausalLM"]
        config.save_pretrained(path)
        return path

    return write


EARLY = {
    "class": (
        {"kind": "Persimmon"},
        {},
        "TransformerLens does not know the architecture PersimmonForCausalLM; expected",
    ),
    "kind": ({"kind": "Mamba"}, {}, "MambaForCausalLM has layers without attention heads (linear_attention); expected"),
    "template": (
        {"template": None},
        {},
        "PATH has no chat template; expected a chat model; pass chat_template='plain'",
    ),
    "start": (
        {"template": TWICE},
        {},
        "the load check 'start token' failed: the rendered prompt begins with two start ",
    ),
    "system": (
        {"template": NO_SYSTEM},
        {"template_options": {"system": "you help"}},
        "a system text for a chat template without a system turn (no system); leave the system text out, or "
        "begin the user's turn with it",
    ),
    "nothing": ({}, {}, "cannot load the model 'PATH' ("),  # the weights are missed
}


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 names a class in other words")
@pytest.mark.parametrize("name", EARLY)
def test_said_before_weights_are_read(name, unread):
    made, options, expected = EARLY[name]
    path = unread(**made)
    assert message(path, **options).replace(str(path), "PATH").startswith(expected)


def test_a_class_that_nobody_knows(unread):
    path = unread()
    config = path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"nonesuch"'))
    assert "model type `nonesuch`" in message(path)


def test_an_adapter_for_another_base(unread, tmp_path):
    for name, kind, sizes in (
        ("narrow", "Llama", {**SIZES, "hidden_size": 16}),
        ("other", "GPT2", {"n_embd": 16, "n_head": 4, "n_layer": 2}),
    ):
        config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=20, pad_token_id=0)
        layers = {"Llama": ["q_proj"], "GPT2": ["c_attn"]}[kind]
        options = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=layers, fan_in_fan_out=kind == "GPT2")
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), options)
        model.peft_config["default"].base_model_name_or_path = "somebody/narrow"
        model.save_pretrained(tmp_path / name)
    path, tail = unread(), "expected an adapter that was trained for this model (it names 'somebody/narrow')"
    found = message(path, adapter=tmp_path / "narrow")
    assert found.startswith(
        "the adapter 'narrow' does not fit the model (size mismatch for base_model.model.model.layers."
    )
    assert found.endswith(f"(2, 16) for (2, 32)); {tail}")
    found = message(path, adapter=tmp_path / "other")
    assert found.startswith(
        "the adapter 'other' does not fit the model (Target modules {'c_attn'} not found in the base"
    )
    assert found.endswith(tail)


def test_weights_of_a_folder_that_are_no_numbers(folder):
    def change(tensors):
        return {**tensors, DOWN: torch.full_like(tensors[DOWN], float("nan"))}

    assert message(folder(change)) == (
        f"weights that are NaN or infinite: 1 tensor, {DOWN}; expected finite weights; save the checkpoint again"
    )


# --- GGUF -----------------------------------------------------------------------------------------------------------


def gap_to(reference, path):
    """Largest difference of next-token logits from a Hugging Face model's own, and the loaded model."""
    model, gaps = ms.load_model(path), []
    for prompt in ("tea", "a car for tea"):
        tokens = model.tokenize([prompt])
        with torch.no_grad():
            gaps.append((model.logits(tokens)[0] - reference(tokens.ids).logits[0, -1]).abs().max())
    return float(max(gaps)), model


@pytest.mark.parametrize("name", ["tiny.gguf", "TINY.GGUF"])
def test_a_gguf_file(name, tmp_path):
    reference = llama_of()
    gap, model = gap_to(reference, write_gguf(tmp_path / name, reference))
    assert gap < 1e-4 and model.name == name.split(".")[0]
    assert model.token_strings("tea a car")[1:-2] == ["tea", " a", " ", "car"]
    assert str(ms.load_model(tmp_path / name, dtype="auto").dtype) == "torch.float32"


def llama3_factors(theta, d_head, factor):
    """As llama.cpp's converter writes them, one frequency after the other."""
    found = []
    for k in range(0, d_head, 2):
        wavelength = 2 * math.pi * theta ** (k / d_head)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_factors_of_llama_3(factor, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    options = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 131072,
    }
    reference, plain = llama_of(**options, rope_parameters=rope), llama_of(**options)
    factors = llama3_factors(10000.0, 64, factor)
    assert 0 < sum((factors > 1) & (factors < factor)) < 16
    tensors = {**gguf_tensors(reference), "rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "three.gguf", reference, tensors)
    assert gap_to(reference, path)[0] < 1e-4
    made = transformers.AutoModelForCausalLM.from_pretrained(gguf_folder(read_header(path)))
    assert made.config.rope_parameters == rope | {"factor": pytest.approx(factor)}
    frequencies = [model.model.rotary_emb.inv_freq for model in (made, reference, plain)]
    assert torch.equal(*frequencies[:2]) and not torch.equal(*frequencies[1:])


def test_rotary_factors_that_change_nothing(tmp_path):
    reference = llama_of()
    tensors = {**gguf_tensors(reference), "rope_freqs.weight": np.ones(4, np.float32)}
    assert gap_to(reference, write_gguf(tmp_path / "one.gguf", reference, tensors))[0] < 1e-4


TAIL = "load the Hugging Face checkpoint that it was made from"


def broken_gguf(kind, path):
    model = llama_of()
    tensors = gguf_tensors(model)
    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    up = "blk.1.ffn_up.weight"
    options = {
        "missing": {"tensors": {name: tensor for name, tensor in tensors.items() if name != up}},
        "unread": {"tensors": {**tensors, "blk.0.attn_q.bias": np.ones(32, np.float32)}},
        "factors": {"tensors": {**tensors, "rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}},
        "linear": {"settings": linear},
        "scale": {"settings": [("add_attention_scale", 0.5)]},
        "window": {"settings": [("add_sliding_window", 4)]},
        "merges": {"merges": None},
        "shape": {"tensors": {**tensors, up: tensors[up][:40]}},
        "NaN": {"tensors": {**tensors, up: np.where(tensors[up] == tensors[up][0, 0], np.float32("nan"), tensors[up])}},
        "empty": {"tensors": {}},
        "part": {"settings": [("add_uint16", ("split.count", 2))]},
        "template": {"template": None},
        "architecture": {"architecture": "bert-x"},
    }
    write_gguf(path, model, **options.get(kind, {}))
    whole = path.read_bytes()
    cut = {"half": len(whole) // 2, "short": len(whole) - 1, "head": 6, "texts": 900}
    path.write_bytes(whole[: cut.get(kind, len(whole))])
    if kind == "version":
        path.write_bytes(whole[:4] + b"\1" + whole[5:])
    if kind == "nameless":
        path.write_bytes(whole.replace(b"general.architecture", b"general.architectura"))
    if kind == "kind":  # the number behind a tensor's name and shape says how it is stored
        start = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
        path.write_bytes(whole[:start] + b"\xff" + whole[start + 1 :])
    return path


BROKEN = {
    "missing": "'x.gguf' lacks 1 tensor, blk.1.ffn_up.weight; expected every tensor of LlamaForCausalLM",
    "unread": "'x.gguf' holds what transformers does not read: 1 tensor, blk.0.attn_q.bias; "
    f"expected a file whose tensors are all the model's; {TAIL}",
    "shape": "'x.gguf' holds blk.1.ffn_up.weight of the shape (40, 32); expected (48, 32), as LlamaForCausalLM has it "
    "by the file's settings; download it again",
    "NaN": "weights that are NaN or infinite: 1 tensor, model.layers.1.mlp.up_proj.weight; expected finite weights; ",
    "factors": "'x.gguf' scales its rotary frequencies in a way that is not known here (rope_freqs.weight); expected",
    "linear": "'x.gguf' says llama.rope.scaling.type = linear, and transformers takes none; "
    f"expected settings that carry over; {TAIL}",
    "scale": "'x.gguf' says llama.attention.scale = 0.5, which transformers does not read; "
    f"expected settings that carry over; {TAIL}",
    "window": "'x.gguf' says llama.attention.sliding_window = 4, and transformers takes None; expected settings that",
    "merges": "'x.gguf' holds no merges (tokenizer.ggml.merges), so its text cannot be tokenized; expected a GGUF file "
    "with its whole tokenizer; convert the model again with a current llama.cpp",
    "half": "'x.gguf' is cut off: it holds 68064 of 136128 bytes and not the whole of 14 tensors, such as blk.0.attn",
    "short": "'x.gguf' is cut off: it holds 136127 of 136128 bytes and not the whole of 1 tensor, "
    "output.weight; expected a whole GGUF file; download it again",
    "head": "'x.gguf' is cut off within its header, after 6 bytes; expected a whole GGUF file; download it again",
    "texts": "'x.gguf' is cut off within its header, after 900 bytes; expected a whole GGUF file; download it again",
    "version": "'x.gguf' is damaged (its format has the number 1, and 2 and 3 are known); expected a whole GGUF file",
    "kind": "'x.gguf' is damaged (",
    "architecture": "cannot read 'x.gguf' (GGUF model with architecture bert-x is not supported yet.); expected a GGUF",
    "nameless": "'x.gguf' names no architecture (general.architecture); expected a GGUF file of a model",
    "empty": "'x.gguf' holds no tensors; expected a GGUF file of a model",
    "part": "'x.gguf' is one part of several; merge them: llama-gguf-split --merge",
    "template": "x has no chat template; expected a chat model; pass chat_template='plain' (command: --chat-template ",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_gguf_files_that_are_refused(kind, tmp_path, cache, monkeypatch):
    path = broken_gguf(kind, tmp_path / "x.gguf")
    if kind not in ("NaN",):
        monkeypatch.setattr(gguf_module, "_weights", lambda *args: pytest.fail("the weights were read"))
    assert message(path).replace(str(path), "x.gguf").startswith(BROKEN[kind])
    assert [entry.name for entry in cache.glob("*") if entry.suffix != ".lock"] == []


def test_a_package_gguf_that_is_missing_or_another(tmp_path, monkeypatch):
    (path := tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    assert message(path) == "reading a GGUF file needs the package gguf; run: pip install gguf"
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))  # a script of the user's, called gguf.py
    assert message(path) == (
        "the package gguf cannot be used (cannot import name 'GGML_QUANT_SIZES' from 'gguf' (unknown location)); "
        "expected gguf 0.17 or newer; rename your own file if it is called gguf.py; otherwise run: "
        "pip install --upgrade gguf"
    )


def test_a_file_is_converted_once(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf", llama_of())
    first = ms.load_model(path)
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "y.gguf"
    copy.write_bytes(path.read_bytes())
    (copy.parent / "tokenizer_config.json").write_text("{")  # of another model that happens to be there
    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "_convert", lambda *args: pytest.fail("converted again"))
        again = ms.load_model(copy)
    assert (first.name, again.name) == ("x", "y") and first.weights_sha256 == again.weights_sha256
    assert first.tokenizer.backend_tokenizer.to_str() == again.tokenizer.backend_tokenizer.to_str()
    [folder] = [entry for entry in cache.iterdir() if entry.is_dir()]
    stored = folder / "model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert ms.load_model(path).weights_sha256 == first.weights_sha256 and stored.read_bytes() == whole
    other = llama_of()
    other.lm_head.weight.data += 1
    assert ms.load_model(write_gguf(path, other)).weights_sha256 != first.weights_sha256


def test_a_file_as_the_base_of_an_adapter(make_tokenizer, tmp_path):
    """The adapter's own tokenizer, with its template, stands for the file's, which has none."""
    model = llama_of()
    path = write_gguf(tmp_path / "x.gguf", model, template=None)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    wrapped.peft_config["default"].base_model_name_or_path = str(path)
    torch.nn.init.normal_(
        wrapped.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    assert message(tmp_path / "adapter").startswith("the base model of the adapter 'adapter': x has no chat template; ")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    found = ms.load_model(tmp_path / "adapter")
    assert found.name == "x+adapter" and found.render("tea")[0] == "<s><user>tea<end><assistant>"


def test_what_ends_a_reply(tmp_path):
    """A file may name the end of a turn besides the end of a text."""
    settings = [("add_eot_token_id", 2)]
    assert ms.load_model(write_gguf(tmp_path / "a.gguf", llama_of(), settings=settings)).end_ids == (1, 2)
    assert ms.load_model(write_gguf(tmp_path / "b.gguf", llama_of())).end_ids == (1,)


# --- files on the hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local copy of a repository, as the hub's client keeps it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--owner--repo", "0123456789" * 4
    for folder in ("refs", "blobs", f"snapshots/{commit}/small"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    write_gguf(repository / "blobs" / "blob", llama_of())
    for name in ("x.gguf", "small/x.gguf"):
        (repository / "snapshots" / commit / name).symlink_to(repository / "blobs" / "blob")


def test_a_file_of_a_repository(hub, tmp_path):
    model = ms.load_model("owner/repo", file="x.gguf")
    assert model.name == "owner/repo/x.gguf"
    path = write_gguf(tmp_path / "x.gguf", llama_of())
    assert ms.load_model("owner/repo", file="small/x.gguf").weights_sha256 == model.weights_sha256
    local = ms.load_model(tmp_path, file="x.gguf")
    assert local.weights_sha256 == ms.load_model(path).weights_sha256 == model.weights_sha256 and local.name == "x"


@pytest.mark.parametrize(
    ("given", "file", "expected"),
    [
        ("owner/repo", "y.gguf", "cannot get the file 'y.gguf' of 'owner/repo' ("),
        ("owner/repo", "model.safetensors", "file='model.safetensors'; expected the name of a .gguf file"),
        ("demo", "x.gguf", "file='x.gguf' of 'demo'; expected a hub id or a folder"),
        ((1, 2), "x.gguf", "file='x.gguf' of a tuple; expected a hub id or a folder"),
        (Path("nowhere"), "x.gguf", "file='x.gguf' of 'nowhere'; expected a hub id or a folder"),
        (Path(), "x.gguf", "no such file: x.gguf; expected a GGUF file"),
    ],
)
def test_files_that_are_not_there(given, file, expected, hub):
    assert message(given, file=file).startswith(expected)


# --- what may be given ----------------------------------------------------------------------------------------------


def test_a_path_is_a_path(make_hf_model, make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "base_folder", lambda: pytest.fail("the embedded model was read"))
    assert message(Path("demo")) == (
        "no such folder or file: demo; expected a local path; pass a name or hub id as a string"
    )
    make_hf_model("llama").save_pretrained("demo")
    make_tokenizer().save_pretrained("demo")
    model = ms.load_model(Path("demo"))
    assert model.name == "demo" and model.d_model == 32
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ms.load_model("~/demo").weights_sha256 == model.weights_sha256


def test_dtypes(make_hf_model, make_tokenizer, tmp_path):
    make_hf_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.bfloat16), (torch.float16, torch.float16), (None, torch.float32)):
        assert ms.load_model(tmp_path, dtype=dtype).dtype == expected
    for dtype, expected in (("auto", torch.bfloat16), ("torch.float16", torch.float16)):
        pair = (make_hf_model("llama", dtype=torch.bfloat16), make_tokenizer())
        assert ms.load_model(pair, dtype=dtype).dtype == expected


WANTED = "expected 'demo', a hub id, a Hugging Face folder, a .gguf file, (model, tokenizer) or a TransformerLens model"


@pytest.fixture
def unchecked():
    """Annotations are not checked, as outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_what_is_no_model(llama, make_hf_model, make_tokenizer, unchecked):
    assert message(3) == f"a int was given as the model; {WANTED}"
    assert message(None) == f"a NoneType was given as the model; {WANTED}"
    pair = [make_hf_model("llama"), make_tokenizer()]
    assert message(pair) == f"a list was given as the model; {WANTED}; write (model, tokenizer)"
    assert message(llama) == "LlamaForCausalLM is loaded already; use it as it is"
    assert message((torch.nn.Linear(2, 2), make_tokenizer())) == "a Linear; expected a Hugging Face model"
    parallel = torch.nn.DataParallel(make_hf_model("llama"))
    assert message((parallel, make_tokenizer())) == "a DataParallel; expected a Hugging Face model; pass model.module"
    assert message((1, 2, 3)) == "a tuple of ('int', 'int', 'int'); expected (Hugging Face model, tokenizer)"
