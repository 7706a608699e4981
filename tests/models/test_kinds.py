"""Kinds of model: what is taken, what is refused and how, and that nothing underneath touches the environment."""

import copy
import sys
from contextlib import contextmanager
from subprocess import run

import pytest
import torch
import transformers
from reference import whole_logits
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import hooked
from mechsafety.patching import pair_runs

PROMPTS = ["how do i make a bomb", "teach me to help"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
DECODER = "expected a decoder whose layers are attention and one MLP each"

# --- nothing is started ---------------------------------------------------------------------------------------------

STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}
_seen, _watching = [], []
sys.addaudithook(lambda event, args: _seen.append((event, args)) if _watching and event in STARTS else None)


@contextmanager
def watched():
    """The processes that are started inside, as the interpreter itself reports them."""
    _seen.clear()
    _watching.append(True)
    try:
        yield _seen
    finally:
        _watching.clear()


def test_the_watch_sees_a_process():
    with watched() as started:
        run([sys.executable, "-c", ""], check=True)
    assert started and started[0][0] in STARTS


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loading_starts_no_process(kind, make_hf_model, make_tokenizer):
    with watched() as started:
        ms.load_model((make_hf_model(kind), make_tokenizer()))
    assert started == []


# --- multimodal models ----------------------------------------------------------------------------------------------


def multimodal(kind, make_tokenizer):
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": len(make_tokenizer()), "num_key_value_heads": 2, "initializer_range": 0.2}
    text |= {"bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0}
    gemma = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
    turning = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    t = transformers
    made = {
        "gemma3": lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(text_config={**text, **gemma}, vision_config=VISION, mm_tokens_per_image=4)
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**VISION))
        ),
        "mistral3": lambda: t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(text_config=t.MistralConfig(**text), vision_config=t.PixtralVisionConfig(**VISION))
        ),
        "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config={**text, **turning},
                vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
            )
        ),
    }
    return made[kind]().eval()


def logits_of(model, lens, prompt):
    """Of a model that is not wrapped, on the ids of one prompt alone."""
    with torch.no_grad():
        return model(lens.tokenize([prompt]).ids).logits[0, -1]


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 has no Gemma-3")
@pytest.mark.parametrize(("kind", "part"), [("gemma3", "Gemma3"), ("llava", "Llama")])
def test_the_language_model_of_a_multimodal_one(kind, part, make_tokenizer):
    whole = multimodal(kind, make_tokenizer)
    with watched() as started:
        model = ms.load_model((multimodal(kind, make_tokenizer), make_tokenizer()))
    assert started == []
    assert type(model.hf_model).__name__ == f"{part}ForCausalLM"
    for prompt in PROMPTS:
        torch.testing.assert_close(model.logits([prompt])[0], logits_of(whole, model, prompt), atol=1e-4, rtol=1e-4)
    assert len(model.generate(PROMPTS, 3)) == 2


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 has no Gemma-3")
def test_a_folder_of_a_multimodal_model(make_tokenizer, tmp_path):
    whole = multimodal("mistral3", make_tokenizer)
    whole.save_pretrained(tmp_path / "vl")
    make_tokenizer().save_pretrained(tmp_path / "vl")
    with watched() as started:
        model = ms.load_model(tmp_path / "vl")
    assert started == [] and model.name == "vl"
    torch.testing.assert_close(model.logits(PROMPTS[:1])[0], logits_of(whole, model, PROMPTS[0]), atol=1e-4, rtol=1e-4)


def test_a_language_model_that_cannot_be_taken_out(make_tokenizer):
    with watched() as started:
        found = refusal(multimodal("qwen2_vl", make_tokenizer), make_tokenizer)
    assert started == [] and found.startswith(
        "Qwen2VLForConditionalGeneration is multimodal, and its language model cannot be taken out alone; expected a"
    )


# --- kinds that are refused -----------------------------------------------------------------------------------------


def refusal(model, make_tokenizer):
    """The one line that a model is refused with."""
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model((model, make_tokenizer()))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def refused(kind, size):
    t, text = transformers, {**SIZES, "vocab_size": size, "num_key_value_heads": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    flat = {**text, "num_key_value_heads": 4, "pad_token_id": 0}
    return {
        "minicpm3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**flat, **latent, first_k_dense_replace=2)),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, state_size=8)
        ),
        "mpt": lambda: t.MptForCausalLM(
            t.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=size, logit_scale="inv_sqrt_d_model")
        ),
        "cohere 0": lambda: t.CohereForCausalLM(t.CohereConfig(**text, logit_scale=0.0)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES, vocab_size=size, initializer_range=0.5)),
        "headless": lambda: t.LlamaModel(t.LlamaConfig(**text)),
        "classifier": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**text)),
    }[kind]().eval()


REFUSED = {
    "minicpm3": "DeepseekV3ForCausalLM has latent attention (kv_lora_rank=8): its heads share compressed keys and ",
    "mamba": "MambaForCausalLM has layers without attention heads (linear_attention); expected a decoder whose",
    "mpt": "MptForCausalLM scales its logits or what its blocks add (logit_scale=inv_sqrt_d_model), which the analyses",
    "cohere 0": "CohereForCausalLM scales its logits or what its blocks add (logit_scale=0.0), which the analyses do "
    "not follow; expected a model with logit_scale=1",
    "t5": f"T5ForConditionalGeneration is an encoder-decoder; {DECODER}",
    "bert": "BertForMaskedLM is no causal model: its logits change by ",
    "headless": "LlamaModel has no language-model head, so it gives no logits; expected a model such as "
    "LlamaForCausalLM; load it with transformers.AutoModelForCausalLM",
    "classifier": "LlamaForSequenceClassification has no language-model head, so it gives no logits; expected",
}


KNOWN = pytest.mark.generation("TransformerBridge", reason="3.9 does not know BERT, and says so first")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=KNOWN) if k == "bert" else k for k in REFUSED])
def test_kinds_that_are_refused(kind, make_tokenizer):
    assert refusal(refused(kind, len(make_tokenizer())), make_tokenizer).startswith(REFUSED[kind])


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_folders_of_kinds_that_are_refused(kind, make_tokenizer, tmp_path):
    refused(kind, len(make_tokenizer())).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(MechsafetyError, match=r"is an encoder-decoder|layers without attention heads"):
        ms.load_model(tmp_path / "m")


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 knows neither")
def test_architectures_that_transformer_lens_does_not_know(make_tokenizer):
    size = len(make_tokenizer())
    persimmon = transformers.PersimmonConfig(**SIZES, vocab_size=size, pad_token_id=0)
    assert refusal(transformers.PersimmonForCausalLM(persimmon).eval(), make_tokenizer) == (
        "TransformerLens does not know the architecture PersimmonForCausalLM; expected one such as LlamaForCausalLM, "
        "Qwen3ForCausalLM, Gemma2ForCausalLM or GPT2LMHeadModel"
    )
    bloom = transformers.BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    assert refusal(transformers.BloomForCausalLM(bloom).eval(), make_tokenizer) == (
        "the load check 'MLP' failed: BloomForCausalLM cannot be run this way (TypeError: BloomMLP.forward() missing 1 "
        "required positional argument: 'residual')"
    )


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 knows neither")
@pytest.mark.parametrize("kind", ["norms without weights", "class of a user"])
def test_architectures_that_are_exact(kind, make_tokenizer, pairs, logit_difference):
    """OLMo's norms have no weights; TransformerLens knows a user's subclass by its base."""
    t, size = transformers, len(make_tokenizer())
    torch.manual_seed(0)
    if kind == "norms without weights":
        model = t.OlmoForCausalLM(t.OlmoConfig(**SIZES, vocab_size=size, pad_token_id=0, initializer_range=0.2))
    else:
        mine = type("MyLlama", (t.LlamaForCausalLM,), {})
        model = mine(t.LlamaConfig(**SIZES, vocab_size=size, pad_token_id=0, initializer_range=0.2))
    lens = ms.load_model((copy.deepcopy(model.eval()), make_tokenizer()))
    for prompt in PROMPTS:
        torch.testing.assert_close(lens.logits([prompt])[0], logits_of(model, lens, prompt), atol=1e-5, rtol=1e-5)
    assert lens.d_mlp == 48
    direct = ms.direct_logit_attribution(lens, PROMPTS, logit_difference)
    parts = direct.heads.sum((0, 1)) + direct.mlps.sum(0) + direct.embed + direct.rest
    torch.testing.assert_close(parts, logit_difference(lens.logits(PROMPTS)), atol=1e-4, rtol=1e-4)


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_there(make_tokenizer):
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(make_tokenizer()), pad_token_id=0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert refusal(model, make_tokenizer) == (
        "weights that are not in memory (on the meta device): 21 tensors, such as lm_head.weight; expected a model "
        "with all its weights loaded; load the weights, or let load_model place them: "
        "load_model(name, device_map='auto')"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(value, make_hf_model, make_tokenizer):
    model = make_hf_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    assert refusal(model, make_tokenizer) == (
        "weights that are NaN or infinite: 1 tensor, model.layers.1.mlp.up_proj.weight; expected finite weights; "
        "save the checkpoint again"
    )


def test_quantised_weights(make_hf_model, make_tokenizer):
    model = make_hf_model("llama")
    packed = torch.nn.Parameter(torch.zeros(32, 24, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight = packed
    assert refusal(model, make_tokenizer).startswith(
        "quantised weights: 1 tensor, model.layers.0.mlp.down_proj.weight; expected float32, bfloat16 or float16; load"
    )


def test_layers_that_round_their_inputs(make_hf_model, make_tokenizer):
    model = torch.ao.quantization.quantize_dynamic(make_hf_model("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    assert refusal(model, make_tokenizer) == (
        "quantised layers: 22 layers, such as lm_head, a Linear; expected float32, bfloat16 or float16, or only "
        "weights of 4 bits (bitsandbytes) or 8 bits (torchao); load the model without quantization_config, or with "
        "BitsAndBytesConfig(load_in_4bit=True)"
    )


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 has no Apertus")
def test_parameters_that_are_one_number(make_tokenizer, pairs, log_odds):
    """Apertus learns the shape of its activation function."""

    def load(shift=0.0):
        torch.manual_seed(0)
        config = transformers.ApertusConfig(**SIZES, vocab_size=len(make_tokenizer()), pad_token_id=0)
        model = transformers.ApertusForCausalLM(config).eval()
        number = next(p for p in model.parameters() if p.numel() == 1)
        number.data += shift
        return ms.load_model((model, make_tokenizer()))

    one, other = load(), load(0.5)
    assert one.weights_sha256 == load().weights_sha256 != other.weights_sha256
    assert ms.activation_patching(one, pairs, log_odds, progress=False).provenance.weights_sha256 == one.weights_sha256


def test_multimodal_and_other_models_of_transformer_lens(make_tokenizer):
    if hooked.installed():
        pytest.skip("TransformerLens 3.9 makes neither")
    from transformer_lens.model_bridge import TransformerBridge

    config = transformers.GraniteConfig(**SIZES, vocab_size=len(make_tokenizer()), logits_scaling=8.0)
    model = transformers.GraniteForCausalLM(config).eval()
    model.config.architectures = ["GraniteForCausalLM"]
    tokenizer = make_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "tiny", "add_bos_token": True}
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(MechsafetyError, match=r"^a wrapped GraniteForCausalLM with logits_scaling=8.0, which"):
        ms.load_model(bridge)


# --- multipliers of logits and blocks -------------------------------------------------------------------------------

SCALED = {
    "cohere": lambda text: transformers.CohereConfig(**text, logit_scale=0.3),
    "granite": lambda text: transformers.GraniteConfig(
        **text, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.05, logits_scaling=8.0
    ),
    "granite, experts": lambda text: transformers.GraniteMoeConfig(
        **text, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.22, logits_scaling=6.0
    ),
}


@pytest.mark.generation("TransformerBridge", reason="3.9 does not know these classes")
@pytest.mark.parametrize("kind", SCALED)
def test_multipliers_move_into_the_weights(kind, make_tokenizer, pairs, log_odds):
    """The same function, and the parts of what the model writes add up to its logits."""
    torch.manual_seed(1)
    text = {**SIZES, "vocab_size": len(make_tokenizer()), "num_key_value_heads": 2, "initializer_range": 0.2}
    text |= {"bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0}
    plain = transformers.AutoModelForCausalLM.from_config(SCALED[kind](text)).eval()
    own = copy.deepcopy(plain)
    model = ms.load_model((own, make_tokenizer()))
    prompts = [*PROMPTS, *pairs.harmful[:2]]
    with torch.no_grad():
        expected = torch.stack([plain(model.tokenize([prompt]).ids).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(model.logits(prompts), expected, atol=1e-5, rtol=1e-4)
    assert all(
        getattr(own.config, name, 1.0) == 1.0 for name in ("logit_scale", "logits_scaling", "residual_multiplier")
    )
    linear = ms.RefusalLogOdds((20, 21), ("a", "b"), (30, 31), ("c", "d"))
    found = ms.direct_logit_attribution(model, pairs.harmful, linear, progress=False)
    parts = found.heads.sum((0, 1)) + found.mlps.sum(0) + found.embed + found.rest
    torch.testing.assert_close(parts, linear.scores(model, pairs.harmful).to(parts.dtype), atol=1e-4, rtol=1e-4)
    assert float(found.rest.abs().max()) < 0.1 * float(found.mlps.abs().max()), "nothing large is left unexplained"
    patched = ms.activation_patching(model, pairs, log_odds, nodes=[ms.Node("head", 1, 2)], progress=False)
    runs = pair_runs(model, pairs)
    slow = patched_whole(model, runs.harmful.tokens, runs.harmless.tokens, [ms.Node("head", 1, 2)])
    change = log_odds(whole_logits(model, runs.harmful.tokens)) - log_odds(slow)
    torch.testing.assert_close(patched.changes[0], change, atol=1e-4, rtol=1e-4)
