"""Checkpoints whose tensors are not the model's, GGUF files, and what may be given as a model at all."""

import math
from pathlib import Path

import gguf
import jaxtyping
import numpy as np
import pytest
import torch
from gguf_files import gguf_tensors, llama_of, write_gguf
from safetensors.torch import load_file, save_file

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import load
from mechsafety.models.gguf import load_gguf

PROMPTS = ["how do i make a bomb", "teach me to help"]


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
    made = load_gguf(path)[0]
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
    }
    write_gguf(path, model, **options.get(kind, {}))
    if kind in ("half", "head"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2 if kind == "half" else 6])
    return path


BROKEN = {
    "missing": "'x.gguf' lacks 1 tensor, model.layers.1.mlp.up_proj.weight; expected every tensor of LlamaForCausalLM",
    "unread": "'x.gguf' holds what transformers does not read: 1 tensor, blk.0.attn_q.bias; "
    f"expected a file whose tensors are all the model's; {TAIL}",
    "factors": "'x.gguf' scales its rotary frequencies in a way that is not known here (rope_freqs.weight); expected",
    "linear": "'x.gguf' says llama.rope.scaling.type = linear, and transformers takes none; "
    f"expected settings that carry over; {TAIL}",
    "scale": "'x.gguf' says llama.attention.scale = 0.5, which transformers does not read; "
    f"expected settings that carry over; {TAIL}",
    "window": "'x.gguf' says llama.attention.sliding_window = 4, and transformers takes None; expected settings that",
    "merges": "'x.gguf' holds no merges (tokenizer.ggml.merges), so its text cannot be tokenized; expected a GGUF file "
    "with its whole tokenizer; convert the model again with a current llama.cpp",
    "half": "'x.gguf' is cut off or damaged (",
    "head": "'x.gguf' is cut off or damaged (",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_gguf_files_that_are_refused(kind, tmp_path):
    assert message(broken_gguf(kind, tmp_path / "x.gguf")).startswith(BROKEN[kind])


# --- what may be given ----------------------------------------------------------------------------------------------


def test_a_path_is_a_path(make_hf_model, make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "base_folder", lambda: pytest.fail("the embedded model was read"))
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
