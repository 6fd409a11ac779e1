"""What people read: sentences, tables, links, and the code of the site's pages."""

import ast
import inspect
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from scipy.stats import false_discovery_control

import grokfast_jax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LONG = {*(DOCS / "tables").iterdir(), DOCS / "paper.md"}  # pages that the report writes, whose tables may be long
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
DOCUMENTS = sorted([*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md", *PAGES])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)


def without_code(text):
    """The text less its front matter, fenced blocks and comments."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^([`:]{3,})[^\n]*\n.*?^\1[`:]*\n", "\n", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def sentences(text):
    """The sentences of the prose: no headings, tables, pictures or code."""
    text = re.sub(r"^(#.*|\|.*|\(.*\)=)$", "\n", without_code(text), flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from filter(None, re.split(r"(?<=[.?!:])[\"')*]*\s+(?=[\W_]*[A-Z0-9`])", " ".join(paragraph.split())))


def tables(text):
    """The tables, each a list of rows without its titles; a row is a list of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", without_code(text), re.MULTILINE):
        yield [row.strip("|").split("|") for row in table.splitlines()]


def words(text):
    """The number of words outside code."""
    return len(re.sub(r"[|\-:]{2,}|!?\[|\]\([^)]*\)", " ", without_code(text)).replace("|", " ").split())


def test_sentences_are_found():
    text = (
        "# Title\n\nOne two. Three\nfour, 0.5 five.\n\n- A [b](c/d.md) c\n- D: `E` f.\n\n```sh\nx y\n```\n| a | b |\n"
    )
    assert list(sentences(text)) == ["One two.", "Three four, 0.5 five.", "A b c", "D:", "`E` f."]


@every_document
def test_no_sentence_is_longer_than_30_words(path):
    assert [s for s in sentences(path.read_text()) if len(s.split()) > 30] == []


@every_document
def test_tables_are_small_unless_they_are_pages_of_their_own(path):
    for titles, _, *rows in tables(path.read_text()):
        assert len(titles) <= 7, titles
        assert len(rows) <= 12 or path in LONG, titles


@every_document
def test_what_is_significant_stays_so_when_adjusted_over_its_table(path):
    for table in tables(path.read_text()):
        p = [float(x) for x in re.findall(r"\(p [=<] ([\d.]+)\)", str(table))]
        lost = {one: f"{q:.2g}" for one, q in zip(p, false_discovery_control(p), strict=True) if one < 0.05 <= q}
        assert all(f"p = {one} becomes {q}" in " ".join(path.read_text().split()) for one, q in lost.items()), lost


def test_documents_keep_to_their_length():
    assert words((ROOT / "README.md").read_text()) <= 600
    assert words((ROOT / "benchmarks" / "README.md").read_text()) <= 1500


def test_a_finding_is_a_claim_with_a_picture_its_numbers_and_a_link_to_more():
    _, *claims, last = re.split(r"^## ", (DOCS / "findings.md").read_text(), flags=re.MULTILINE)
    assert last.startswith("Related work")
    assert 1 <= len(claims) <= 10
    for claim in claims:
        heading, _, body = claim.partition("\n")
        assert 60 <= words(re.sub(r"!\[.*\]\(.*\)", "", body)) <= 110, heading
        assert len(re.findall(r"!\[.+\]\(pictures/\w+\.png\)", body)) == 1, heading
        assert re.search(r"^\*(New|Confirms|Confirms in part|Contradicts)\.\*", body, re.MULTILINE), heading
        assert re.search(r"\]\([\w/]+\.md", body), heading
        assert "`python -m " in body, heading


def anchors(path):
    """The anchors of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*slugs, *re.findall(r"^\((.*)\)=$", path.read_text(), re.MULTILINE)}


@every_document
def test_relative_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if not re.match(r"https?://", link):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert ROOT in [target, *target.parents], link
            assert not anchor or anchor in anchors(target), link


def code_blocks():
    """The Python code of README and site, by place; the recipes have tests of their own, the tutorial is executed."""
    for path in [ROOT / "README.md", *PAGES]:
        if path.name not in ("recipes.md", "tutorial.md"):
            for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)):
                yield pytest.param(code, id=f"{path.stem} {i}")


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("code", list(code_blocks()))
def test_code_runs_and_its_transformations_update(code):
    names = {}
    exec(code, names)
    if "params" in names:  # a step of training
        assert jnp.all(names["params"]["w"] < 1)
        return
    params = {"embedding": jnp.ones(2), "blocks": jnp.ones((2, 2))}
    kinds = optax.GradientTransformation | optax.MultiSteps
    transformations = {name: value for name, value in names.items() if isinstance(value, kinds)}
    assert transformations
    for tx in transformations.values():
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_half_lives_and_ages_are_those_of_the_filters():
    (rows,) = [table for table in tables((DOCS / "choose.md").read_text()) if "α" in table[0][0]]
    for alpha, half_life, age, window in (map(float, row) for row in rows[2:]):
        assert half_life == round(math.log(0.5) / math.log(alpha), 1)
        assert grokfast_jax.mean_age(grokfast_jax.ema(alpha)) == pytest.approx(age, rel=1e-4)
        assert grokfast_jax.mean_age(grokfast_jax.moving_average(int(window))) == pytest.approx(age, rel=1e-4)


def test_every_public_name_is_on_the_api_page():
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(grokfast_jax.__all__)


def test_the_defaults_that_are_told_are_those_of_the_code():
    (rows,) = [table for table in tables((DOCS / "start.md").read_text()) if "`alpha`" in table[2][0]]
    ours = {row[0].strip().replace("`", ""): ast.literal_eval(row[-1].strip()) for row in rows[2:]}
    defaults = lambda f: {name: p.default for name, p in inspect.signature(f).parameters.items()}
    ema, ma = defaults(grokfast_jax.grokfast_ema), defaults(grokfast_jax.grokfast_ma)
    assert ours == {
        "alpha": ema["alpha"],
        "lamb of the EMA": ema["lamb"],
        "window_size": ma["window_size"],
        "lamb of the MA": ma["lamb"],
    }


def test_every_field_of_a_state_is_on_the_api_page():
    text = (DOCS / "api.md").read_text()
    for name in (name for name in grokfast_jax.__all__ if name.endswith("State")):
        assert all(f"`{field}`" in text for field in getattr(grokfast_jax, name)._fields), name
