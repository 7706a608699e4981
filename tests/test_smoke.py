def test_tiny(any_model, pairs, log_odds):
    print(any_model.explain_tokens(pairs.harmful[0]))
    assert any_model.tokenize_pairs(pairs).start == 2
