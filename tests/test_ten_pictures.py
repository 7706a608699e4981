"""The ten pictures: slides whose numbers are those of the stored results, in a page that needs nothing else."""

import base64
import doctest
import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest
import ten_pictures
from pages.page import RESULTS
from ten_pictures import FILES, FOLDER, page, slides

COMMITTED = (FOLDER / FILES[0]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown():
    return slides()


def stored(name):
    return json.loads((RESULTS.parent / name).read_text(encoding="utf-8"))


def texts(html):
    """Claim and caveat of every slide, by its name."""
    found = re.findall(
        r'<section id="([\w-]+)">.*?<h[12]>(.*?)</h[12]>.*?<p class="caveat">(.*?)</p>', html, flags=re.DOTALL
    )
    return {name: (unescape(claim), unescape(caveat)) for name, claim, caveat in found}


def test_the_committed_page_says_what_the_stored_results_say(shown):
    assert texts(COMMITTED) == {slide.name: (slide.claim, slide.caveat) for slide in shown}, "make slides"
    assert len(shown) == len({slide.name for slide in shown}) == 10


def test_each_slide_claims_one_sentence_and_limits_it_with_one(shown):
    for slide in shown:
        for said in (slide.claim, slide.caveat):
            assert said.endswith(".") and len(re.findall(r"[.!?](?=\s+[A-Z]|$)", said)) == 1, said
        assert slide.shows.endswith(".") and (RESULTS.parent / slide.source).is_file()


def percent(value, digits=0):
    return f"{100 * value:.{digits}f}%"


def expected():
    """Numbers of the slides, read from the JSON alone."""
    demo, native = stored("gallery/demo.json"), stored("results/native-model/native-node.json")
    check, other = demo["verification"], native["verification"]
    claims = [claim for claim in check["claims"] if claim["name"] != "faithfulness"]
    by_verdict = [sum(claim["passed"] is verdict for claim in claims) for verdict in (True, False, None)]
    by_role = [
        sum(n["role"] == r for n in demo["nodes"]) for r in ("detection", "evaluation", "decision", "production")
    ]
    ten = next(point for point in check["curve"] if point["n_nodes"] == 10)
    rates = stored("results/refusal-direction.json")["rates"]
    heads = next(r for r in stored("results/robustness.json")["curves"]["heads"]["rows"] if r["parts"] == 10)
    audit = stored("results/audit.json")
    tried = [copy for copy in audit["copies"] if copy["role"] == "adaptive"]
    removed, added = rates["JailbreakBench"], rates["Alpaca (rest)"]
    p = {claim["name"]: claim["p_value"] for claim in check["claims"]}
    return {
        "behaviour": [
            *(percent(demo["behaviour"][kind]["refusal_rate"]) for kind in ("harmful", "harmless")),
            sum(demo["provenance"]["options"][part] for part in ("found_on", "held_out", "fresh")),
        ],
        "spread": [
            "nothing" if ten["held_out"] < 0.0005 else percent(ten["held_out"], 1),
            percent(check["fresh"]["faithfulness"]),
            *map(percent, check["fresh"]["ci"]),
            f"of {demo['n_candidates']} ",
            f"the {len(demo['nodes'])} ",
        ],
        "circuit": [len(demo["nodes"]), len(demo["edges"]), len(demo["search"]["linked"])],
        "controls": [
            *(percent(check["random_controls"][name]) for name in ("observed", "highest")),
            *(percent(check["necessity_controls"][name]) for name in ("observed", "mean")),
            f"p = {p['sufficiency']:.3f}",
            f"p = {p['necessity']:.2f}",
        ],
        "claims": [
            f"{len(claims)} claims",
            *(f"{n} {w}" for n, w in zip(by_verdict, ("hold", "fail", "are"), strict=True) if n),
        ],
        "roles": [f"{n} {w}" for n, w in zip(by_role, ("detect", "evaluate", "decide", "write"), strict=True)],
        "another-model": [
            f"{sum(node['kind'] == 'head' for node in native['nodes'])} heads",
            f"{sum(node['kind'] == 'mlp' for node in native['nodes'])} MLPs",
            percent(other["fresh"]["faithfulness"]),
            *map(percent, other["fresh"]["ci"]),
            f"of {native['behaviour']['harmful']['n']} pairs",
        ],
        "direction": [
            percent(hits / n)
            for hits, n in (
                *(removed[name] for name in ("as it is", "direction removed")),
                *(added[name] for name in ("as it is", "direction added")),
            )
        ],
        "fragility": [
            *(percent(heads[name]) for name in ("lost", "refuses", "random_high", "degenerate")),
            f"p = {heads['p_value']:.3f}",
        ],
        "audit": [
            f"{audit['caught'][0]} of {audit['caught'][1]} ",
            f"{audit['false_alarms'][0]} false alarms on {audit['false_alarms'][1]} ",
            f"{len(tried)} attempts",
            f"{sum(copy['score'] < 1 for copy in tried)} evade",
        ],
    }


@pytest.mark.parametrize(("name", "numbers"), [pytest.param(*item, id=item[0]) for item in expected().items()])
def test_its_numbers_are_those_of_the_json(name, numbers):
    said = " ".join(texts(COMMITTED)[name])
    said = re.sub(r"\b1 (\w+)s\b", r"1 \1", said)  # "1 holds" and "5 hold" are counted alike
    missing = [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(str(number))}", said)]
    assert not missing, said


def test_random_directions_do_neither():
    for place, way in (("JailbreakBench", "removed"), ("Alpaca (rest)", "added")):
        rates = stored("results/refusal-direction.json")["rates"][place]
        plain, moved = rates["as it is"][0], [rates[f"random {k} {way}"][0] for k in (1, 2)]
        assert all(abs(hits - plain) <= 5 for hits in moved)


def test_the_page_needs_no_network_and_escapes_what_it_shows(shown):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'content="{policy}"' in COMMITTED and "<script" not in COMMITTED
    assert not re.findall(r"(?:src|href)=\"(?!data:)", COMMITTED)
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', COMMITTED)
    assert len(pictures) == 10
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture).decode("utf-8"))
    slide = shown[0]
    sly = type(slide)("a", "<script>x</script>.", "b & c.", '"d".', "e", slide.picture)
    html = page([sly])
    assert "<script" not in html and "b &amp; c." in html and "&#34;d&#34;." in html


def test_the_same_results_give_the_same_bytes(shown):
    assert page(shown) == page(slides())


def test_the_pdf_has_one_page_for_each_slide():
    pdf = (FOLDER / FILES[1]).read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) == 10


def test_examples():
    assert doctest.testmod(ten_pictures).failed == 0
