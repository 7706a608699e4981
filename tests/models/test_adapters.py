"""Adapters: every kind computes merged what peft computes, or is refused in one line."""

import json
import logging

import peft
import pytest
import torch
import transformers

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import adapters

PROBES = [torch.tensor([[2, 40, 91, 77, 93, 5, 6]]), torch.tensor([[2, 60, 8, 9]])]
SIZES = {"vocab_size": 180, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.2, "bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 180, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
BASES = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "biased": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "nemotron": lambda: transformers.NemotronConfig(**GROUPED),
    "phi": lambda: transformers.PhiConfig(**GROUPED),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "falcon": lambda: transformers.FalconConfig(**SIZES, multi_query=True, parallel_attn=True),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, bos_token_id=2, eos_token_id=6),
}


def base(kind, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(BASES[kind]()).eval().to(dtype)


def logits(model, rows=PROBES):
    with torch.no_grad():
        return [model(input_ids=row).logits[0] for row in rows]


def train(wrapped, seed=1):
    """Random numbers in the place of what an adapter learns."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            # in place: some are shared
            parameter.data.copy_(1 + 0.5 * noise if "ia3" in name or "magnitude" in name else 0.3 * noise)
    return wrapped.eval()


def saved(kind, config, folder, **options):
    """peft's own model; its adapter is in the folder."""
    wrapped = train(peft.get_peft_model(base(kind, **options), config))
    wrapped.save_pretrained(folder)
    return wrapped


def lora(modules=("q_proj", "v_proj"), **options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(modules), **options)


def ia3(modules, feedforward):
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=feedforward)


VALID = {
    "lora": ("llama", lora()),
    "lora on every linear layer": ("llama", lora(["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])),
    "lora on Conv1D": ("gpt2", lora(["c_attn"], fan_in_fan_out=True)),
    "lora, tied lm_head": ("tied", lora(["lm_head"])),
    "lora, tied embed_tokens": ("tied", lora(["embed_tokens"])),
    "lora, tied both": ("tied", lora(["embed_tokens", "lm_head"])),
    "lora, tied together": ("tied", lora(["embed_tokens"], ensure_weight_tying=True)),
    "lora, embeddings of their own": ("llama", lora(["embed_tokens", "lm_head"])),
    "rslora": ("llama", lora(use_rslora=True)),
    "dora": ("llama", lora(use_dora=True)),
    "lora of several ranks": ("llama", lora(rank_pattern={"v_proj": 4}, alpha_pattern={"q_proj": 3})),
    "lora with replicated layers": ("llama", lora(layer_replication=[[0, 2], [1, 2]])),
    "lora and a module saved whole": ("llama", lora(modules_to_save=["lm_head"])),
    "lora and a tied module saved whole": ("tied", lora(modules_to_save=["lm_head"])),
    "lora and a tied embedding saved whole": ("tied", lora(modules_to_save=["embed_tokens"])),
    "lora and all biases": ("biased", lora(bias="all")),
    "lora and its layers' biases": ("biased", lora(bias="lora_only")),
    "lora and new tokens": ("llama", lora(trainable_token_indices={"embed_tokens": [3, 170]})),
    "lora and new tied tokens": ("tied", lora(trainable_token_indices=[3, 170])),
    "vera": ("llama", peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])),
    "vera without its matrices": (
        "llama",
        peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], save_projection=False),
    ),
    "vb-lora": (
        "llama",
        peft.VBLoRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_vectors=4, vector_length=4, topk=2),
    ),
    "lora where blocks add in place": ("falcon", lora(["dense", "dense_4h_to_h"])),
    "loha": ("llama", peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])),
    "ia3 gated": ("llama", ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "ia3 gated with biases": ("biased", ia3(["down_proj"], ["down_proj"])),
    "ia3 gated in one matrix": ("phi3", ia3(["down_proj"], ["down_proj"])),
    "ia3 on up_proj too": ("llama", ia3(["up_proj", "down_proj"], ["down_proj"])),
    "ia3 nemotron": ("nemotron", ia3(["down_proj"], ["down_proj"])),
    "ia3 phi": ("phi", ia3(["fc2"], ["fc2"])),
    "ia3 gpt_neox": ("gpt_neox", ia3(["dense_4h_to_h"], ["dense_4h_to_h"])),
    "ia3 gpt2": ("gpt2", ia3(["mlp.c_proj"], ["mlp.c_proj"])),
}


@pytest.mark.parametrize("name", VALID)
def test_merged_is_what_peft_computes(name, tmp_path):
    kind, config = VALID[name]
    wrapped = saved(kind, config, tmp_path / "adapter")
    rows = [*PROBES, torch.tensor([[3, 170]])]
    expected, plain = logits(wrapped, rows), logits(base(kind), rows)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, plain, strict=True)) > 0.05
    merged = adapters.apply_adapter(base(kind), tmp_path / "adapter", PROBES)
    assert type(merged) is type(base(kind))
    merged.tie_weights()  # as saving and loading do: what was untied stays so
    for found, wanted in zip(logits(merged, rows), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora, tied lm_head", "ia3 nemotron", "dora", "lora with replicated layers"])
def test_a_peft_model_is_merged_in_a_copy(name, tmp_path):
    kind, config = VALID[name]
    wrapped = train(peft.get_peft_model(base(kind), config))
    expected = logits(wrapped)
    merged = adapters.merged_copy(wrapped, PROBES)
    assert not adapters.is_peft(merged) and adapters.is_peft(wrapped)
    for found, again, wanted in zip(logits(merged), logits(wrapped), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(again, wanted)


@pytest.mark.parametrize("name", ["lora on every linear layer", "ia3 gated", "ia3 nemotron", "lora, tied lm_head"])
def test_half_precision(name, tmp_path):
    """Rounding alone moves logits far there; each merged layer is compared with its own rounding."""
    kind, config = VALID[name]
    saved(kind, config, tmp_path / "adapter", dtype=torch.bfloat16)
    assert (
        adapters.apply_adapter(base(kind, dtype=torch.bfloat16), tmp_path / "adapter", PROBES).dtype == torch.bfloat16
    )


def test_a_tied_weight_is_copied_where_one_end_changes(tmp_path):
    wrapped = saved("tied", lora(["lm_head"]), tmp_path / "adapter")
    merged, plain = adapters.apply_adapter(base("tied"), tmp_path / "adapter", PROBES), base("tied")
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, plain.lm_head.weight) and not merged.config.tie_word_embeddings
    # peft alone changes both ends
    gap = float((logits(wrapped.merge_and_unload())[0] - logits(merged)[0]).abs().max())
    assert gap > 0.1
    saved("tied", lora(), tmp_path / "other")
    untouched = adapters.apply_adapter(base("tied"), tmp_path / "other", PROBES)
    assert untouched.lm_head.weight is untouched.get_input_embeddings().weight


def test_scales_are_folded_before_the_product_only(tmp_path):
    """Into up_proj of a gated MLP, whose neurons then show them; into down_proj behind a nonlinearity."""
    for kind, changed in (("llama", "up_proj"), ("nemotron", "down_proj")):
        saved(kind, ia3(["down_proj"], ["down_proj"]), tmp_path / kind)
        merged, plain = (
            adapters.apply_adapter(base(kind), tmp_path / kind, PROBES).state_dict(),
            base(kind).state_dict(),
        )
        names = {name.split(".")[-2] for name in plain if not torch.equal(plain[name], merged[name])}
        assert names == {changed}, kind


# --- a merge that goes wrong ------------------------------------------------------------------------------------------


def refusal(model, folder):
    with pytest.raises(MechsafetyError) as caught:
        adapters.apply_adapter(model, folder, PROBES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_peft_merges_otherwise(dtype, tmp_path, monkeypatch):
    saved("llama", lora(), tmp_path / "adapter", dtype=dtype)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda self, **options: None)
    line = refusal(base("llama", dtype=dtype), tmp_path / "adapter")
    assert line.startswith("the merged adapter 'adapter' computes something else than peft: off by 0.")
    assert "in base_model.model.model.layers.0.self_attn.q_proj; expected at most" in line


def test_logits_that_differ_from_pefts(tmp_path, monkeypatch):
    """Tied weights, not copied: each layer is right alone."""
    saved("tied", lora(["lm_head"]), tmp_path / "adapter")
    monkeypatch.setattr(adapters, "_copy_shared", lambda wrapped: None)
    line = refusal(base("tied"), tmp_path / "adapter")
    assert line.startswith("the merged adapter 'adapter' computes something else than peft: off by")
    assert line.endswith("in its logits; expected at most 1e-03, which is rounding")


def test_an_adapter_without_effect(tmp_path, monkeypatch, caplog):
    peft.get_peft_model(base("llama"), lora()).save_pretrained(tmp_path / "fresh")
    with caplog.at_level(logging.WARNING):
        adapters.apply_adapter(base("llama"), tmp_path / "fresh", PROBES)
    assert "the adapter 'fresh' changes nothing, as one that was not trained" in caplog.text
    saved("llama", lora(["embed_tokens"]), tmp_path / "tokens")
    silent = [torch.zeros(7, 180)] * len(PROBES)
    monkeypatch.setattr(adapters, "_logits", lambda model, rows: silent)
    line = refusal(base("llama"), tmp_path / "tokens")
    assert (
        line == "the adapter 'tokens' changes weights and no logit of 2 prompts; expected an adapter that has an effect"
    )


# --- adapters that are none, or another model's -----------------------------------------------------------------------


PROMPTS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_adapters_that_change_no_weights(kind, tmp_path):
    wrapped = peft.get_peft_model(base("llama"), PROMPTS[kind])
    wrapped.save_pretrained(tmp_path / "soft")
    rest = "which changes no weights; expected an adapter that changes weights, such as LoRA, DoRA, VeRA or (IA)3"
    assert refusal(base("llama"), tmp_path / "soft") == f"the adapter 'soft' is {kind}, {rest}"
    with pytest.raises(MechsafetyError, match=f"^the adapter 'default' is {kind}, which changes no weights"):
        adapters.merged_copy(wrapped, PROBES)


def edit(folder, change):
    """Change the tensors of an adapter folder."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, lambda t: t.pop(f"{Q}.lora_B.weight"), f"it lacks 1 weights, such as {Q}.lora_B.default.weight"),
        ({}, lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(2)}), "it has besides 1 weights, such as base_mod"),
        ({}, lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(9, 2)}), f"size mismatch for {Q}.lora_B.default.w"),
        ({}, lambda t: t[f"{Q}.lora_B.weight"].mul_(torch.nan), "1 of its weights are NaN or infinite, such as base_"),
        ({"bias": "all"}, lambda t: t.pop(f"{Q}.base_layer.bias"), "it lacks 1 weights, such as base_model.model"),
        (
            {"modules_to_save": ["lm_head"]},
            lambda t: t.pop("base_model.model.lm_head.weight"),
            "it lacks base_model.model.lm_head.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(options, change, reason, tmp_path):
    kind = "biased" if "bias" in options else "llama"
    saved(kind, lora(**options), tmp_path / "adapter")
    edit(tmp_path / "adapter", change)
    model = base(kind)
    line = refusal(model, tmp_path / "adapter")
    assert line.startswith(f"the adapter 'adapter' does not fit the model ({reason}")
    assert line.rpartition("; ")[2].startswith("expected an adapter that was trained for this model")
    # and the model is as it was
    adapters.check_no_adapter(model)
    for found, wanted in zip(logits(model), logits(base(kind)), strict=True):
        assert torch.equal(found, wanted) or "bias" in options


def test_an_adapter_of_another_model(tmp_path):
    saved("llama", lora(), tmp_path / "adapter")
    assert "does not fit the model (Target modules" in refusal(base("gpt2"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/llama"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "hidden_size": 64}))
    line = refusal(wide, tmp_path / "adapter")
    assert "(size mismatch for " in line and line.endswith("trained for this model (it names 'some/llama')")


@pytest.mark.parametrize(
    ("text", "line"),
    [("{", "is not JSON (Expecting"), ("[]", "names no peft_type; expected"), ("{}", "names no peft_type; expected")],
)
def test_folders_that_are_no_adapters(text, line, tmp_path):
    assert refusal(base("llama"), tmp_path / "none").startswith(f"no adapter in {tmp_path / 'none'}; expected a folder")
    (tmp_path / "adapter_config.json").write_text(text)
    assert line in refusal(base("llama"), tmp_path)


def test_adapter_layers_inside_a_plain_model(make_tokenizer):
    model = base("llama")
    model.add_adapter(lora())
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model((model, make_tokenizer()), chat_template="plain")
    assert str(caught.value) == (
        "a LlamaForCausalLM with adapter layers that are not merged; expected a plain model, or a PeftModel; "
        "load the base model and pass adapter=FOLDER"
    )


# --- load_model -------------------------------------------------------------------------------------------------------


def test_a_peft_model_is_loaded(make_tokenizer):
    wrapped = train(peft.get_peft_model(base("tied"), lora(["lm_head"])))
    model = ms.load_model((wrapped, make_tokenizer()))
    tokens = model.tokenize(["make tea"])
    torch.testing.assert_close(model.logits(tokens), logits(wrapped, [tokens.ids])[0][-1:], atol=1e-4, rtol=1e-4)
    assert model.name == "LlamaForCausalLM+default"
    with pytest.raises(MechsafetyError, match=r"^an adapter for a PeftModelForCausalLM; merge it before"):
        ms.load_model((wrapped, make_tokenizer()), adapter="anything")


@pytest.fixture
def adapted(tmp_path, make_tokenizer):
    """A folder with a base model and an adapter of it, which names the base as it is told to; peft's own model."""

    def build(named, own_tokenizer=False):
        model, tokenizer = base("llama"), make_tokenizer()
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        wrapped = saved("llama", lora(), tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
        if own_tokenizer:
            tokenizer.chat_template = "Q {{ messages[0]['content'] }} A"
            tokenizer.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", wrapped

    return build


@pytest.mark.parametrize(("named", "own"), [("{}/base", False), ("../base", True)])
def test_an_adapter_folder_as_the_model(adapted, tmp_path, named, own, recwarn):
    folder, wrapped = adapted(named.format(tmp_path), own)
    recwarn.clear()
    model = ms.load_model(folder)
    # peft says it where a base model is elsewhere than it was in training, as it is on every other machine
    assert not [warning for warning in recwarn if "was renamed" in str(warning.message)]
    assert model.name == "base+adapter"
    assert model.render("tea")[0] == ("Q tea A" if own else "<s><user>tea<end><assistant>")
    tokens = model.tokenize(["make tea"])
    torch.testing.assert_close(model.logits(tokens), logits(wrapped, [tokens.ids])[0][-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("named", "line"),
    [
        (None, "the adapter 'adapter' names no base model; pass the base model and adapter='adapter'"),
        (
            "/nowhere/base",
            "the base model '/nowhere/base' of the adapter 'adapter' is not there; expected a model folder or a hub "
            "id; pass the base model and adapter='adapter'",
        ),
        ("nobody/nothing-at-all", "the base model of the adapter 'adapter': cannot load the model 'nobody/nothing-at-"),
    ],
)
def test_an_adapter_without_its_base(adapted, named, line):
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model(adapted(named)[0])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_an_adapter_as_the_model_and_another(adapted, tmp_path):
    folder, _ = adapted("../base")
    with pytest.raises(
        MechsafetyError, match=r"^the model 'adapter' is an adapter, and adapter='x' was given; pass the"
    ):
        ms.load_model(folder, adapter="x")
