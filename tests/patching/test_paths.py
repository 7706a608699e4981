"""Path patching against plain hooks on whole forwards that freeze everything else."""

import pytest
import torch

import mechsafety as ms
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs, path_patching
from mechsafety.sites import Site, SiteKind

PRE_NORM = ["llama", "gpt2", "gpt_neox", "qwen3"]


def frozen_run(model, pairs, metric, sender, mlp, *, receivers=(), swap=False):
    """Metric when only the sender's value is the source's and attention (and MLPs) stay as in the base run.

    Returns the metric, and what each receiver reads or writes in that run (for a second, live run).
    """
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    if swap:
        base, source = source, base
    sites = [Site(kind, layer) for kind in (SiteKind.Z, SiteKind.MLP_OUT) for layer in range(model.n_layers)]
    own, other = model.read(base, sites), model.read(source, sites)
    hooks = []
    seen = {}
    for site in sites:
        is_sender = site.layer == sender.layer and (site.kind is SiteKind.Z) == (sender.kind == "head")
        if site.kind is SiteKind.MLP_OUT and mlp == "recompute" and not is_sender:
            continue
        value = own[site].clone()
        if is_sender and sender.kind == "head":
            value[:, :, sender.index] = other[site][:, :, sender.index]
        elif is_sender:
            value = other[site]
        hooks.append((site, lambda tensor, value=value: value))
    for site in receivers:
        hooks.insert(0, (site, lambda tensor, site=site: seen.__setitem__(site, tensor.clone())))
    with model.hooks(hooks):
        return metric(model.logits(base)), seen


@pytest.mark.parametrize("mlp", ["freeze", "recompute"])
@pytest.mark.parametrize("kind", PRE_NORM)
def test_to_logits(kind, mlp, make_model, pairs, log_odds):
    model = make_model(kind)
    nodes = head_and_mlp_nodes(model.n_layers, model.n_heads)
    for direction in ("noising", "denoising"):
        result = path_patching(model, pairs, log_odds, senders=nodes, mlp=mlp, direction=direction, progress=False)
        swap = direction == "denoising"
        for k, node in enumerate(nodes):
            expected, _ = frozen_run(model, pairs, log_odds, node, mlp, swap=swap)
            change = result.changes[k, 0]
            found = result.harmless + change if swap else result.harmful - change
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=f"{node} {direction}")


@pytest.mark.parametrize("mlp", ["freeze", "recompute"])
@pytest.mark.parametrize("kind", PRE_NORM)
def test_to_slots(kind, mlp, make_model, pairs, log_odds):
    """The receiver's slot is read in a run that is frozen up to it, and put into a live run, seen by it alone."""
    model = make_model(kind)
    base = model.tokenize(pairs.harmful)
    senders = [Node("head", 0, 1), Node("mlp", 0), Node("head", 1, 3)]
    slots = {"q": SiteKind.Q, "k": SiteKind.K, "v": SiteKind.V}
    for head, slot in ((1, "q"), (2, "k"), (2, "v")):
        receiver, site = (Node("head", 2, head), slot), Site(slots[slot], 2)
        result = path_patching(model, pairs, log_odds, senders=senders, receivers=[receiver], mlp=mlp, progress=False)
        for k, sender in enumerate(senders):
            _, seen = frozen_run(model, pairs, log_odds, sender, mlp, receivers=[site])
            z_site, store = Site(SiteKind.Z, 2), {}
            edits = [(site, lambda t, v=seen[site]: v), (z_site, lambda t, s=store: s.__setitem__("z", t.clone()))]
            with model.hooks(edits):
                model.logits(base)

            def only(tensor, store=store, head=head):
                out = tensor.clone()
                out[:, :, head] = store["z"][:, :, head]
                return out

            with model.hooks([(z_site, only)]):
                expected = log_odds(model.logits(base))
            found = result.harmful - result.changes[k, 0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=f"{sender} -> {receiver}")


@pytest.mark.parametrize("kind", PRE_NORM)
def test_to_an_mlp(kind, make_model, pairs, log_odds):
    model = make_model(kind)
    base, site = model.tokenize(pairs.harmful), Site(SiteKind.MLP_OUT, 2)
    senders = [Node("head", 0, 1), Node("mlp", 1), Node("head", 2, 0)]
    result = path_patching(model, pairs, log_odds, senders=senders, receivers=[(Node("mlp", 2), "mlp")], progress=False)
    for k, sender in enumerate(senders):
        _, seen = frozen_run(model, pairs, log_odds, sender, "recompute", receivers=[site])
        with model.hooks([(site, lambda tensor, value=seen[site]: value)]):
            expected = log_odds(model.logits(base))
        if sender.layer == 2 and model.parallel:
            expected = result.harmful  # a head does not reach the MLP beside it
        torch.testing.assert_close(result.harmful - result.changes[k, 0], expected, atol=1e-4, rtol=0)


def test_joint_receivers_are_patched_in_one_run(llama, pairs, log_odds):
    sender, slots = Node("head", 0, 1), [(Node("head", 2, 1), "q"), (Node("head", 1, 2), "v"), (Node("mlp", 2), "mlp")]
    joint = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots, joint=True, progress=False)
    assert joint.changes.shape == (1, 1, len(pairs)) and len(joint.receivers[0]) == 3
    one = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots[:1], progress=False)
    same = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots[:1], joint=True, progress=False)
    torch.testing.assert_close(one.changes, same.changes, atol=1e-5, rtol=0)
    apart = path_patching(llama, pairs, log_odds, senders=[sender], receivers=slots, progress=False)
    assert not torch.allclose(joint.changes[:, 0], apart.changes.sum(1), atol=1e-4), "joint is one run, not a sum"


def test_frozen_downstream_is_the_receivers_direct_effect(llama, pairs, logit_difference):
    """With everything after it frozen, a receiving head reaches the logits through its own output alone."""
    sender, receiver = Node("head", 0, 1), (Node("head", 2, 1), "v")
    live, frozen = (
        path_patching(
            llama, pairs, logit_difference, senders=[sender], receivers=[receiver], downstream=after, progress=False
        )
        for after in ("live", "frozen")
    )
    # the last layer's head is followed by the last MLP only: freezing that one by hooks gives the same
    runs = pair_runs(llama, pairs)
    base, site = llama.tokenize(pairs.harmful), Site(SiteKind.V, 2)
    _, seen = frozen_run(llama, pairs, logit_difference, sender, "recompute", receivers=[site])
    z_site, store = Site(SiteKind.Z, 2), {}
    with llama.hooks([(site, lambda t: seen[site]), (z_site, lambda t: store.__setitem__("z", t.clone()))]):
        llama.logits(base)
    mlp = llama.read(base, [Site(SiteKind.MLP_OUT, 2)])[Site(SiteKind.MLP_OUT, 2)]

    def only(tensor):
        out = tensor.clone()
        out[:, :, 1] = store["z"][:, :, 1]
        return out

    with llama.hooks([(z_site, only), (Site(SiteKind.MLP_OUT, 2), lambda tensor: mlp)]):
        expected = logit_difference(llama.logits(base))
    torch.testing.assert_close(frozen.harmful - frozen.changes[0, 0], expected, atol=1e-4, rtol=0)
    assert not torch.allclose(live.changes, frozen.changes, atol=1e-4)
    assert len(runs.harmful) == len(pairs)


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
    assert repr(result) == "PathMap(12 senders -> 1 receivers, mlp=recompute)"
    frame = result.to_dataframe()
    assert list(frame.effect.abs()) == sorted(frame.effect.abs(), reverse=True)
    assert frame.receiver.unique().tolist() == ["logits.resid"]
    assert len(result.plot().data[0].x) == 12
    result.save(tmp_path / "paths")
    back = ms.PathMap.load(tmp_path / "paths")
    assert torch.equal(back.changes, result.changes) and back.senders == result.senders
    assert back.receivers == result.receivers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "thaw"}, r"mlp='thaw'; expected one of \('recompute', 'freeze'\)"),
        ({"downstream": "dead"}, "downstream='dead'"),
        ({"receivers": "logit"}, "receivers='logit'; expected 'logits' or"),
        ({"senders": [Node("neuron", 0, 1)]}, "L0.N1 cannot send"),
        ({"receivers": [(Node("head", 2, 0), "mlp")]}, "L2.H0 has no slot 'mlp'"),
        ({"receivers": [(Node("logits"), "resid")], "joint": True}, "the logits cannot be a joint receiver"),
    ],
)
def test_errors(llama, pairs, log_odds, options, message):
    with pytest.raises(ms.MechsafetyError, match=message):
        path_patching(llama, pairs, log_odds, progress=False, **options)


def test_norms_after_attention_are_refused(make_model, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match="normalises each block's output; expected a model whose heads add up"):
        path_patching(make_model("gemma2"), pairs, log_odds, progress=False)
