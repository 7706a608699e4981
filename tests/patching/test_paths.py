"""Path patching against plain hooks on whole forwards that freeze everything else."""

import pytest
import torch
from reference import frozen_run, hook_count, path_whole

import mechsafety as ms
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching import At, Projection, pair_runs, path_patching, path_projection
from mechsafety.patching.paths import measured_edges
from mechsafety.sites import Site, SiteKind

KINDS = ["llama", "gemma2"]


@pytest.mark.parametrize("mlp", ["freeze", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_logits(kind, mlp, shared_model, pairs, log_odds):
    model = shared_model(kind)
    nodes = head_and_mlp_nodes(model.n_layers, model.n_heads)
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    for direction in ("noising", "denoising"):
        result = path_patching(model, pairs, log_odds, senders=nodes, mlp=mlp, direction=direction, progress=False)
        swap = direction == "denoising"
        for k, node in enumerate(nodes):
            ends = (source, base) if swap else (base, source)
            expected = log_odds(frozen_run(model, *ends, node, mlp=mlp)[0])
            change = result.changes[k, 0]
            found = result.harmless + change if swap else result.harmful - change
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=f"{node} {direction}")


@pytest.mark.parametrize("downstream", ["live", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_slots(kind, downstream, shared_model, pairs, log_odds):
    """The receiver's slot is read in a run that is frozen up to it, and put into a live run, seen by it alone."""
    model = shared_model(kind)
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    senders = [Node("head", 0, 1), Node("mlp", 0), Node("head", 1, 3), Node("neuron", 1, 7)]
    for node, slot in ((Node("head", 2, 1), "q"), (Node("head", 2, 2), "k"), (Node("mlp", 2), "mlp")):
        options = {"mlp": "recompute", "downstream": downstream}
        result = path_patching(
            model, pairs, log_odds, senders=senders, receivers=[(node, slot)], progress=False, **options
        )
        for k, sender in enumerate(senders):
            expected = log_odds(path_whole(model, base, source, sender, [(node, slot)], **options))
            found = result.harmful - result.changes[k, 0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=f"{sender} -> {node} {slot}")


def test_options_are_different_quantities(llama, pairs, log_odds):
    def changes(**options):
        receivers = [(Node("head", 2, 1), "v")]
        sender = [Node("head", 0, 1)]
        return path_patching(
            llama, pairs, log_odds, senders=sender, receivers=receivers, progress=False, **options
        ).changes

    for name, value in (("mlp", "freeze"), ("norm", "freeze"), ("downstream", "frozen"), ("direction", "denoising")):
        assert not torch.allclose(changes(), changes(**{name: value}), atol=1e-4), name


def test_frozen_norms_and_mlps_make_projections_add_up(any_model, pairs):
    """With both frozen, what the embedding, heads and MLPs move sums to the whole difference of the two runs."""
    model = any_model
    vector = torch.nn.functional.normalize(torch.ones(32), dim=0)
    nodes = [Node("embed"), *head_and_mlp_nodes(2, model.n_heads)]
    projection = Projection(vector, Site("resid_pre", 2))
    options = {"mlp": "freeze", "norm": "freeze", "progress": False}
    found = path_projection(model, pairs, projection, senders=nodes, **options)
    if not model.post_norm:  # there heads share one norm, whose scale the source run has otherwise
        torch.testing.assert_close(found.changes[:, 0].sum(0), found.harmful - found.harmless, atol=1e-4, rtol=0)
    whole = path_projection(model, pairs, projection, senders=[Site("resid_pre", 2)], progress=False)
    torch.testing.assert_close(whole.changes[0, 0], whole.harmful - whole.harmless, atol=1e-5, rtol=0)
    assert whole.metric == {"name": "projection", "site": "L2.resid_pre", "positions": "-1"}
    back = path_projection(model, pairs, projection, senders=nodes[:3], direction="denoising", **options)
    assert model.post_norm or torch.allclose(back.changes, found.changes[:3], atol=1e-5)


def test_joint_receivers_are_patched_in_one_run(llama, pairs, log_odds):
    sender, slots = Node("head", 0, 1), [(Node("head", 2, 1), "q"), (Node("head", 1, 2), "v"), (Node("mlp", 2), "mlp")]
    joint = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots, joint=True, progress=False)
    assert joint.changes.shape == (1, 1, len(pairs)) and len(joint.receivers[0]) == 3
    one = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots[:1], progress=False)
    same = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots[:1], joint=True, progress=False)
    torch.testing.assert_close(one.changes, same.changes, atol=1e-5, rtol=0)
    apart = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots, progress=False)
    assert not torch.allclose(joint.changes[:, 0], apart.changes.sum(1), atol=1e-4), "joint is one run, not a sum"


def test_later_senders_change_nothing(llama, pairs, log_odds):
    result = path_patching(
        llama, pairs, log_odds, senders=[Node("head", 2, 0)], receivers=[(Node("head", 1, 0), "q")], progress=False
    )
    assert bool((result.changes == 0).all())


def test_positions(llama, pairs, log_odds):
    """Paths to the logits start where the last token is: at the instruction there is none."""
    whole, suffix, instruction = (
        path_patching(llama, pairs, log_odds, positions=where, progress=False).changes
        for where in ("all", "suffix", "instruction")
    )
    torch.testing.assert_close(whole, suffix)
    assert float(instruction.abs().max()) < 1e-5


def test_result(llama, pairs, log_odds, tmp_path):
    result = path_patching(llama, pairs, log_odds, progress=False)
    assert repr(result) == "PathMap(12 senders -> 1 receivers, mlp=recompute, norm=recompute)"
    frame = result.to_dataframe()
    assert list(frame.effect.abs()) == sorted(frame.effect.abs(), reverse=True)
    assert frame.receiver.unique().tolist() == ["logits.resid"]
    assert len(result.plot().data[0].x) == 12
    result.save(tmp_path / "paths")
    back = ms.patching.PathMap.load(tmp_path / "paths")
    assert torch.equal(back.changes, result.changes) and back.senders == result.senders
    assert back.receivers == result.receivers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "thaw"}, r"mlp='thaw'; expected one of \('recompute', 'freeze'\)"),
        ({"downstream": "dead"}, "downstream='dead'"),
        ({"receivers": "logit"}, "receivers='logit'; expected 'logits' or"),
        ({"norm": "thaw"}, r"norm='thaw'; expected one of \('recompute', 'freeze'\)"),
        (
            {"senders": [Node("logits")]},
            "logits cannot send; expected the embedding, heads, MLPs, neurons, or a site of",
        ),
        ({"senders": [Site("q", 0)]}, "L0.q cannot send"),
        ({"senders": []}, "no senders"),
        ({"senders": [Node("head", 3, 0)]}, "L3.H0 does not exist in Llama"),
        ({"receivers": [(Node("neuron", 0, 48), "mlp")]}, "L0.N48 does not exist in Llama"),
        ({"receivers": []}, "no receivers; expected 'logits' or"),
        ({"positions": "middle"}, "no span is called 'middle'"),
        ({"positions": [-99]}, r"positions \[-99\]; expected positions from the end"),
        ({"positions": "each", "senders": [At(Node("mlp", 0), (-1,))]}, "positions='each' and a sender with positions"),
        ({"receivers": [(Node("head", 2, 0), "mlp")]}, "L2.H0 has no slot 'mlp'"),
        ({"receivers": [(Node("logits"), "resid")], "joint": True}, "the logits cannot be a joint receiver"),
        (
            {"receivers": [(Node("mlp", 1), "mlp"), (Node("neuron", 1, 3), "mlp")], "joint": True},
            "L1.N3 and the whole MLP of its layer as joint receivers",
        ),
    ],
)
def test_errors(llama, pairs, log_odds, options, message):
    with pytest.raises(ms.MechsafetyError, match=message):
        path_patching(llama, pairs, log_odds, progress=False, **options)


def test_two_slots_of_one_head_are_patched_together(llama, pairs, log_odds):
    """Query and value of a head, jointly: neither overwrites the other."""
    sender, head = [Node("head", 0, 1)], Node("head", 2, 1)

    def change(*slots):
        receivers = [(head, slot) for slot in slots]
        return path_patching(
            llama, pairs, log_odds, senders=sender, receivers=receivers, joint=True, progress=False
        ).changes

    both, q, v, kv, k = (change(*slots) for slots in ("qv", "q", "v", "kv", "k"))
    for joint, apart in ((both, (q, v)), (kv, (k, v))):
        assert all(not torch.allclose(joint, one, atol=1e-5) for one in apart)
    # a value alone in one head and a key alone in its neighbour of the same group stay apart
    mixed = [(Node("head", 2, 0), "k"), (Node("head", 2, 1), "v")]
    frozen = {"senders": sender, "progress": False, "downstream": "frozen", "mlp": "freeze", "norm": "freeze"}
    metric = ms.RefusalLogOdds((20,), ("a",), (30,), ("c",))
    joint = path_patching(llama, pairs, metric, receivers=mixed, joint=True, **frozen).changes
    single = path_patching(llama, pairs, metric, receivers=mixed, **frozen).changes
    torch.testing.assert_close(joint[:, 0], single.sum(1), atol=1e-5, rtol=0)


def test_each_position_is_a_sender_of_its_own(llama, pairs, log_odds, tmp_path):
    head, receiver = Node("head", 0, 1), [(Node("head", 2, 1), "v")]
    each = path_patching(llama, pairs, log_odds, senders=[head], receivers=receiver, positions="each", progress=False)
    n_pos = pair_runs(llama, pairs).harmful.n_pos
    assert each.senders == tuple(At(head, (column,)) for column in range(-n_pos, 0))
    assert str(each.senders[-1]) == "L0.H1 @ -1" and each.positions == "each"
    one = path_patching(llama, pairs, log_odds, senders=[head], receivers=receiver, positions=[-3], progress=False)
    torch.testing.assert_close(each.changes[-3], one.changes[0])
    assert one.positions == "-3"
    each.save(tmp_path / "each")
    assert ms.patching.PathMap.load(tmp_path / "each").senders == each.senders


def test_an_interrupt_leaves_the_model_clean(llama, pairs, log_odds):
    runs, before = pair_runs(llama, pairs, extra=[SiteKind.NEURONS]), hook_count(llama)
    logits = llama.logits(pairs.harmful)
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    receivers = [(Node("mlp", 1), "mlp"), (Node("neuron", 1, 3), "mlp"), (Node("head", 2, 1), "k")]
    for options in ({"receivers": receivers, "norm": "freeze"}, {"norm": "freeze"}, {"receivers": receivers}):
        calls.clear()
        with llama.bridge.blocks[1].mlp.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
            path_patching(llama, runs, log_odds, progress=False, **options)
        assert hook_count(llama) == before
    assert torch.equal(llama.logits(pairs.harmful), logits)


def test_bars_count_the_senders_that_reach(llama, pairs, log_odds, recorded_bars):
    shown = recorded_bars("mechsafety.patching.paths.progress_bar")
    path_patching(llama, pairs, log_odds, receivers=[(Node("head", 1, 0), "q"), (Node("mlp", 1), "mlp")])
    unit = torch.nn.functional.one_hot(torch.tensor(0), 32).float()
    path_projection(llama, pairs, Projection(unit, Site("resid_pre", 2)))
    # 4 heads a layer: those of the layer before, and for the MLP its own layer's too
    assert [bar.n for bar in shown] == [bar.total for bar in shown] == [4 + 8, 8]


def test_bar_shows_time_left(llama, pairs, log_odds, capsys):
    path_patching(llama, pairs, log_odds)
    assert "paths" in (shown := capsys.readouterr().err) and "<" in shown
    runs = pair_runs(llama, pairs)
    edges = [Edge(Node("head", 0, 1), Node("head", 2, 1), "q")]
    measured_edges(llama, runs, log_odds, edges, progress=True)
    assert "edges" in capsys.readouterr().err


def test_projection_errors(llama, gpt_neox, pairs):
    unit = torch.nn.functional.one_hot(torch.tensor(0), 32).float()
    with pytest.raises(ms.MechsafetyError, match=r"a direction of length 2; expected a unit vector; vector /"):
        Projection(2 * unit, Site("resid_pre", 0))
    with pytest.raises(ms.MechsafetyError, match=r"a projection at L0\.z; expected one of \['resid_pre'"):
        Projection(unit, Site("z", 0))
    with pytest.raises(ms.MechsafetyError, match="a direction of 8 numbers; expected d_model = 32"):
        path_projection(llama, pairs, Projection(unit[:8], Site("resid_pre", 0)), progress=False)
    with pytest.raises(ms.MechsafetyError, match="has no residual stream between attention and MLP"):
        path_projection(gpt_neox, pairs, Projection(unit, Site("resid_mid", 0)), progress=False)
    with pytest.raises(ms.MechsafetyError, match="positions='prefix'; expected positions from the first difference on"):
        path_projection(llama, pairs, Projection(unit, Site("resid_pre", 0), "prefix"), progress=False)
    with pytest.raises(ms.MechsafetyError, match="positions='each'; expected one of"):
        At(Node("mlp", 0), "each")


def test_neurons_need_runs_that_hold_them(llama, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match=r"these runs hold no neurons; .*extra=\[SiteKind\.NEURONS\]"):
        path_patching(llama, pair_runs(llama, pairs), log_odds, senders=[Node("neuron", 0, 1)], progress=False)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "olmo2"])
def test_measured_edges_of_many_layers_and_slots_in_one_batch(kind, shared_model, pairs, log_odds):
    """Edges join the batch at their receivers' layers; each is as if it were alone."""
    model = shared_model(kind)
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    head, mlp, logits = Node("head", 0, 1), Node("mlp", 0), Node("logits")
    edges = [Edge(mlp, logits, "resid"), Edge(head, Node("head", 2, 3), "k"), Edge(head, Node("mlp", 1), "mlp")]
    edges += [Edge(mlp, Node("head", 1, 0), slot) for slot in "qkv"] + [Edge(Node("head", 1, 2), logits, "resid")]
    edges += [Edge(Node("head", 1, 1), Node("head", 2, 2), "q"), Edge(mlp, Node("mlp", 2), "mlp")]
    runs = pair_runs(model, pairs)
    found = measured_edges(model, runs, log_odds, edges)
    before = runs.scores(log_odds)[0]
    for edge, change in zip(edges, found, strict=True):
        whole = path_whole(model, base, source, edge.sender, [(edge.receiver, edge.slot)], mlp="freeze")
        torch.testing.assert_close(before - change, log_odds(whole), atol=1e-4, rtol=0, msg=str(edge))


def test_a_single_sender_needs_no_list(llama, pairs, log_odds):
    given = [ms.path_patching(llama, pairs, log_odds, senders=one) for one in ("L1.H2", ["L1.H2"])]
    assert given[0].senders == given[1].senders and torch.equal(given[0].changes, given[1].changes)


@pytest.mark.unchecked
@pytest.mark.parametrize("receivers", [["L2.H1"], [ms.Node("head", 2, 1)], [("L2.H1", "q", 3)]])
def test_a_receiver_without_a_slot_is_refused(llama, pairs, log_odds, receivers):
    with pytest.raises(ms.MechsafetyError, match=r"^the receiver .*; expected a node and the slot .*\('L14.H2', 'q'\)"):
        ms.path_patching(llama, pairs, log_odds, receivers=receivers)
