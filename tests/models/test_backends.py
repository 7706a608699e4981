"""TransformerLens' own models, of either generation, as `load_model` takes them."""

import copy

import pytest
import torch
from reference import whole_logits

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import hooked
from mechsafety.sites import Generation, Site, SiteKind, hook_name

PROMPTS = ["how do i make a bomb", "teach me to help"]
bridge_only = pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 makes a HookedTransformer")
hooked_only = pytest.mark.generation("HookedTransformer", reason="gone from TransformerLens 4")


def test_names_of_sites():
    site = Site(SiteKind.Z, 3)
    assert hook_name(site) == hook_name(site, Generation.HOOKED) == "blocks.3.attn.hook_z"
    names = {
        kind: hook_name(Site(kind), Generation.HOOKED) for kind in (SiteKind.FINAL_NORM_IN, SiteKind.FINAL_NORM_OUT)
    }
    assert list(names.values()) == ["ln_final:in", "ln_final:out"]
    assert hook_name(Site(SiteKind.MLP_IN, 1), Generation.HOOKED) == "blocks.1.mlp:in"
    assert hook_name(Site(SiteKind.FINAL_NORM_IN)) == "ln_final.hook_in"


def test_every_site_can_be_read_and_edited(any_model):
    tokens = any_model.tokenize(PROMPTS)
    before, width = any_model.logits(tokens), tokens.ids.shape[1]
    sites = [Site(SiteKind.MLP_IN, 1), Site(SiteKind.FINAL_NORM_IN), Site(SiteKind.FINAL_NORM_OUT)]
    for site, found in any_model.read(tokens, sites).items():
        assert found.shape == (2, width, any_model.d_model), site
        with any_model.hooks([(site, lambda tensor: tensor.flip(-1))]):
            assert float((any_model.logits(tokens) - before).abs().max()) > 1e-3, site
    assert torch.equal(any_model.logits(tokens), before)


def test_biases(any_model):
    """Of the shape promised, also where the model has none."""
    assert any_model.b_U.shape == (any_model.d_vocab,)
    assert all(any_model.b_O(layer).shape == (any_model.d_model,) for layer in range(any_model.n_layers))


def test_a_wrapped_model_is_taken_as_it_is(llama, pairs, log_odds):
    again = ms.load_model((llama.bridge, llama.tokenizer))
    assert again.bridge is llama.bridge and again.name == "LlamaForCausalLM"
    assert again.weights_sha256 == llama.weights_sha256
    changes = [ms.activation_patching(model, pairs, log_odds, progress=False).changes for model in (llama, again)]
    assert torch.equal(*changes)


def test_an_adapter_comes_too_late(llama, tmp_path):
    with pytest.raises(
        MechsafetyError, match=r"^an adapter for a (TransformerBridge|HookedTransformer); merge it before the model is"
    ):
        ms.load_model((llama.bridge, llama.tokenizer), adapter=tmp_path)


def test_a_module_alone(make_hf_model):
    with pytest.raises(MechsafetyError, match=r"^a LlamaForCausalLM without a tokenizer; pass \(model, tokenizer\)$"):
        ms.load_model(make_hf_model("llama"))


@bridge_only
def test_a_bridge(make_hf_model, make_tokenizer, make_model):
    from transformer_lens.model_bridge import TransformerBridge

    def boot():
        hf, tokenizer = make_hf_model("llama"), make_tokenizer()
        hf.config.architectures = ["LlamaForCausalLM"]
        tokenizer.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": "tiny", "add_bos_token": True}
        return TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer, device="cpu")

    bridge = boot()
    model, expected = ms.load_model(bridge), make_model("llama")
    assert model.bridge is bridge and model.tokenizer is bridge.tokenizer
    torch.testing.assert_close(model.logits(PROMPTS), expected.logits(PROMPTS), atol=1e-5, rtol=1e-5)
    bridge.compatibility_mode = True
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model(bridge)
    assert str(caught.value) == (
        "a TransformerBridge in compatibility mode; expected one with its own weights; "
        "boot it again and leave enable_compatibility_mode() out"
    )


# --- HookedTransformer -----------------------------------------------------------------------------------------------


def made_by_hand(hf, **options):
    """A HookedTransformer as its users make one: configuration, TransformerLens' converter, its processing."""
    import transformer_lens
    from transformer_lens.pretrained import weight_conversions

    architecture = type(hf).__name__
    cfg = transformer_lens.HookedTransformerConfig(
        **hooked._options(hf.config, architecture), original_architecture=architecture, init_weights=False, device="cpu"
    )
    model = transformer_lens.HookedTransformer(cfg, move_to_device=False)
    weights = getattr(weight_conversions, hooked._CONVERTERS[architecture])(hf, cfg)
    model.load_and_process_state_dict({name: value.detach().clone() for name, value in weights.items()}, **options)
    return model


PLAIN = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
FOLDED = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}


@hooked_only
@pytest.mark.parametrize("options", [PLAIN, FOLDED], ids=["raw", "folded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3"])
def test_folding_changes_no_effect(kind, options, make_hf_model, make_tokenizer, make_model, pairs, logit_difference):
    """Norms are gone into weights, the unembedding is centred; what a node does to a difference of logits stays."""
    hf = make_hf_model(kind)
    with torch.no_grad():  # norms that are not all ones
        for name, parameter in hf.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = ms.load_model((copy.deepcopy(hf), make_tokenizer()))
    if kind != "gpt2" and options is FOLDED:  # an RMS norm's input has a mean that matters
        options = {**options, "center_writing_weights": kind == "gpt_neox"}
    model = ms.load_model((made_by_hand(hf, **options), make_tokenizer()))
    assert (model.backend.final_norm.weight == 1).all() == (options["fold_ln"])
    found, plain = (ms.activation_patching(m, pairs, logit_difference, progress=False) for m in (model, expected))
    torch.testing.assert_close(found.changes, plain.changes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.harmful, plain.harmful, atol=1e-4, rtol=1e-4)
    paths = [ms.path_patching(m, pairs, logit_difference, progress=False).changes for m in (model, expected)]
    torch.testing.assert_close(*paths, atol=1e-4, rtol=1e-4)
    edges = [ms.edge_attribution(m, pairs, logit_difference, steps=2, progress=False).scores for m in (model, expected)]
    scale = float(edges[1].abs().max())
    torch.testing.assert_close(edges[0][1:] / scale, edges[1][1:] / scale, atol=1e-4, rtol=1e-3)
    direct = [ms.direct_logit_attribution(m, PROMPTS, logit_difference).total for m in (model, expected)]
    torch.testing.assert_close(*direct, atol=1e-4, rtol=1e-4)


@hooked_only
def test_repeated_keys_and_values(make_hf_model, make_tokenizer):
    """Its W_K and W_V are repeated for all heads; sites and sizes are those of key-value heads."""
    lens = made_by_hand(make_hf_model("llama"), **PLAIN)
    assert lens.W_K.shape[1] == 4
    model = ms.load_model((lens, make_tokenizer()))
    cache = model.cache(PROMPTS, ["k", "v"])
    assert model.n_kv_heads == 2 and cache.k.shape[1] == cache.v.shape[1] == 2
    lens.set_ungroup_grouped_query_attention(True)
    with pytest.raises(MechsafetyError) as caught:
        ms.load_model((lens, make_tokenizer()))
    assert str(caught.value) == (
        "a HookedTransformer that repeats its keys and values for all heads; expected one per key-value head; "
        "call set_ungroup_grouped_query_attention(False) on it"
    )


@hooked_only
def test_what_cannot_be_taken(make_tokenizer, make_hf_model):
    import transformer_lens
    import transformers

    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=1, d_model=8, d_head=4, n_ctx=64, d_vocab=len(make_tokenizer()), attn_only=True, device="cpu"
    )
    with pytest.raises(
        MechsafetyError, match=r"^a HookedTransformer without norms or plain MLPs, or with other positions;"
    ):
        ms.load_model((transformer_lens.HookedTransformer(cfg), make_tokenizer()))
    size = len(make_tokenizer())
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=size, hidden_size=32, n_layer=1, n_head=4)
    )
    with pytest.raises(
        MechsafetyError, match=r"^HookedTransformer cannot be made from a BloomForCausalLM; expected one of"
    ):
        ms.load_model((bloom.eval(), make_tokenizer()))
    grouped = transformers.Olmo2Config(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    with pytest.raises(MechsafetyError, match=r"^HookedTransformer cannot hold an OLMo-2 model with grouped queries;"):
        ms.load_model((transformers.Olmo2ForCausalLM(grouped).eval(), make_tokenizer()))
    scaled = make_hf_model("llama")
    scaled.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(MechsafetyError, match=r"^HookedTransformer has no rotary embedding of type 'yarn';"):
        ms.load_model((scaled, make_tokenizer()))


@hooked_only
def test_the_rotary_embedding_of_llama_3(make_tokenizer):
    import transformers

    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
        max_position_embeddings=128,
    )
    model = ms.load_model((transformers.LlamaForCausalLM(config).eval(), make_tokenizer()))  # the load check compares
    assert model.bridge.cfg.use_NTK_by_parts_rope and model.bridge.cfg.rotary_base == 500.0
    tokens = model.tokenize(PROMPTS)
    torch.testing.assert_close(model.logits(tokens), whole_logits(model, tokens), atol=1e-5, rtol=1e-5)
