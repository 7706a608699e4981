"""What planted models are checked by: whole forwards that share nothing with the engine."""

from whole_forwards import patched_whole

import mechsafety as ms


def wrapped(built):
    """The planted model, wrapped, its metric, and a pair of each topic."""
    model = ms.load_model((built.model, built.tokenizer))
    return built, model, ms.RefusalLogOdds.of(model, ["Sorry"]), built.pairs.sample(4, 1)


def effect(made, nodes):
    """Share of the gap lost when ``nodes`` together take their harmless values."""
    _, model, metric, pairs = made
    tokens = model.tokenize_pairs(pairs)
    harmful, harmless = metric(model.logits(tokens.harmful)), metric(model.logits(tokens.harmless))
    patched = metric(patched_whole(model, tokens.harmful, tokens.harmless, nodes))
    return float((harmful - patched).mean() / (harmful - harmless).mean())
