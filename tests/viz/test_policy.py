"""The content-security policy of every page that the package writes."""

import re
from pathlib import Path

import circuits_drawn as drawn
import pytest

import mechsafety.viz
from mechsafety.viz import attention_html, circuit_html, compare_html, figures_page, render_report
from mechsafety.viz.attention import bundle
from mechsafety.viz.policy import allowed, digest, scripts_of

TEMPLATES = sorted((Path(mechsafety.viz.__file__).parent / "templates").glob("*.html.j2"))


def policy_of(page: str) -> dict[str, list[str]]:
    (text,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    return {name: values for name, *values in (rule.split() for rule in text.split("; "))}


@pytest.fixture(scope="module")
def pages():
    small = drawn.small_circuit(drawn.ATTACK)
    attention = attention_html(small.details.attention, script=False)
    return {
        "circuit": circuit_html(small),
        "comparison": compare_html(small, drawn.small_circuit(), ("a", "b")),
        "report": render_report(small),
        "figures": figures_page("x", attention),
    }


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_each_document_has_a_strict_policy(path):
    """Of templates, so that a new one is tested too; before anything of a file or a model."""
    text = path.read_text(encoding="utf-8")
    policy = policy_of(text.replace("<own scripts>", "'own'"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "data:", "https:"} & set(policy.get("script-src", ()))
    before = text[: text.index("Content-Security-Policy")]
    before = before.replace("{{ theme }}", "")  # one of three words
    assert "{{" not in before and "<script" not in before


@pytest.mark.parametrize("name", ["circuit", "comparison", "report", "figures"])
def test_a_page_allows_its_own_scripts_alone(pages, name):
    page = pages[name]
    own = policy_of(page)["script-src"]
    unpacked = [bundle()] if name in ("report", "figures") else []  # a script that a script of the page makes
    assert own == list(dict.fromkeys(map(digest, [*scripts_of(page), *unpacked]))) and own
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", rule) for rule in own)
    assert digest("alert(1)") not in own and not any("alert(" in script for script in scripts_of(page))


def test_scripts_are_found_in_frames_and_data_are_none():
    page = '<p>&lt;script&gt;no&lt;/script&gt;</p><script type="application/json">no</script><script>a\r\nb</script>'
    page += '<iframe srcdoc="&lt;script&gt;c &amp;amp;&amp;amp; d&lt;/script&gt;"></iframe>'
    assert scripts_of(page) == ["a\nb", "c &amp;&amp; d"]
    assert allowed("<own scripts> <own scripts>") == "'none' <own scripts>", "text of a page is left as it is"
