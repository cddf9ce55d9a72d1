"""Pages and the model card: nothing from data is HTML, colours can be read on dark, the card is one the hub reads."""

import re
from base64 import b64encode
from hashlib import sha256

import pytest
from huggingface_hub import ModelCard

from src import runs
from src.analysis import marks, pages
from tests.analysis.conftest import EVIL, METRICS


def page_of(evaluation, **settings) -> str:
    path = pages.save_page(evaluation.comparison, evaluation.metrics, evaluation.predictions, **settings)
    assert path == evaluation.folder / "comparison" / "side_by_side.html"
    return path.read_text(encoding="utf-8")


def test_side_by_side_escapes_everything_and_shows_what_it_should(make_run, make_evaluation):
    evaluation = make_evaluation(make_run())
    metrics, predictions = evaluation.metrics, evaluation.predictions
    body, page = pages.side_by_side(metrics, predictions, pages.choose_rows(metrics, 2)), page_of(evaluation)
    assert "<script" not in body and page.count("<script") == page.count("</script") == 1  # the page's own
    for view in (body, page):
        assert "<b>" not in view and "&lt;script&gt;" in view and "http:" not in view and "onclick" not in view
        assert view.count("<table>") == view.count("</table>") == 3
        assert "not in the dialogue: 99" in view and '<span class="m-number">99</span>' in view
        assert "ROUGE-L 0.250 · 6 tokens, cut at the cap" in view and "ROUGE-L 0.750 · 7 tokens, EOS" in view
        assert '<span class="dim">(empty)</span>' in view
    assert "demo-00000001, test, n=3" in page and 'content="light dark"' in page


def test_the_page_runs_nothing_but_its_own_script_and_style(make_run, make_evaluation):
    page = page_of(make_evaluation(make_run()))
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not re.search(r"<[^>]*\s(style|on\w+|src|href)=", page)


def test_the_page_knows_gain_score_and_flags_of_every_row(make_run, make_evaluation):
    page = page_of(make_evaluation(make_run()))
    rows = re.findall(r'data-flags="([^"]*)" data-score="([^"]*)" data-gain="([^"]*)"', page)
    assert [(score, gain) for _, score, gain in rows] == [("1.000", "+1.000"), ("0.000", "-0.500"), ("0.750", "+0.500")]
    assert rows[0][0].split() == ["base-cut", "base-lacks", "base-new"] and "finetuned-empty" in rows[1][0].split()
    offered = set(re.findall(r'<option value="((?:base|finetuned)-\w+)">', page))
    assert offered == {flag for flags, _, _ in rows for flag in flags.split()}


def test_a_page_that_would_be_large_keeps_what_fits_and_says_so(make_run, make_evaluation):
    evaluation = make_evaluation(make_run())
    whole, small = page_of(evaluation), page_of(evaluation, limit=22_000)
    assert len(small) < len(whole) and "of 3 rows, so that the page stays small" in small
    assert "stays small" not in whole and 'data-gain="-0.500"' in small  # the most lost is kept


def test_rows_are_chosen_by_gain_and_loss_against_base(metrics):
    # gains of the three rows: +1, -0.5, +0.5
    assert pages.choose_rows(metrics, 1) == {"random": [2], "gained": [0], "lost": [1]}
    assert pages.choose_rows(metrics, 2) == {"random": [], "gained": [0, 2], "lost": [1]}
    metrics["per_row"]["base"]["ROUGE-L"] = [0.0] * 6
    metrics["per_row"]["finetuned"]["ROUGE-L"] = [1.0] * 6  # all tied: the first rows, as they stand
    chosen = pages.choose_rows(metrics, 2, seed=1)
    assert chosen["gained"] == [0, 1] and chosen["lost"] == [] and set(chosen["random"]) <= {2, 3, 4, 5}
    assert chosen == pages.choose_rows(metrics, 2, seed=1)


def test_inline_views_escape_too():
    for view in (
        pages.answers_view({EVIL: EVIL}),
        pages.token_view([{"token": EVIL, "supervised": True}, {"token": EVIL, "supervised": False}]),
    ):
        assert "<script" not in view and "&lt;script&gt;" in view
    assert "␛" in pages.answers_view({"a": "\x1b[2J"}) and "\x1b" not in pages.token_view(
        [{"token": "\x1b", "supervised": True}]
    )


def test_tokens_show_which_are_supervised():
    tokens = [{"token": "Ġprompt", "supervised": False}, {"token": "▁answer", "supervised": True}]
    view = pages.token_view([*tokens, {"token": "Ċ", "supervised": True}])
    assert re.findall("<mark>(.*?)</mark>", view, re.DOTALL) == ["·answer", "⏎\n"] and "·prompt&#8203;" in view


def test_answers_stand_one_under_the_other_and_an_empty_one_says_so():
    marked = pages.answers_view({"fine-tuned": marks.marked_html("<b> 99", "A: hi")})
    assert '&lt;b&gt; <span class="m-number">99</span>' in marked
    view = pages.answers_view({"dialogue": "A: hi\nB: hi", "base": ""})
    cells = re.findall(r"<th[^>]*>(.*?)</th>\s*<td>(.*?)</td>", view, re.DOTALL)
    assert cells == [("dialogue", "A: hi\nB: hi"), ("base", '<span class="dim">(empty)</span>')]


def test_every_view_is_left_alone_by_mathjax(make_run, make_evaluation):
    evaluation = make_evaluation(make_run())
    side = pages.side_by_side(evaluation.metrics, evaluation.predictions, {"random": [0]})
    for view in (pages.answers_view({"a": "$x$"}), pages.token_view([]), side):
        assert 'class="dialogues tex2jax_ignore' in view  # else $5 and $6 become a formula


def luminance(color: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def unreadable(css: str) -> list[str]:
    """The rules whose text cannot be read in every theme, whose own text may be black or white."""
    broken = []
    for rule in re.findall(r"[^{}]+\{[^{}]*\}", css):
        found = dict(re.findall(r"(background|(?<![-\w])color):\s*([^;}!]+)", rule))
        background, color = found.get("background"), found.get("color")
        if background and re.fullmatch(r"#([0-9a-f]{2})\1\1[0-3][0-9a-f]", background):
            continue  # a faint grey on any theme
        if background is None and color is None or (background, color) == ("Canvas", "CanvasText"):  # the theme's own
            continue
        if background is None or color is None:
            broken.append(rule)
            continue
        light, dark = sorted((luminance(background.strip()), luminance(color.strip())), reverse=True)
        if (light + 0.05) / (dark + 0.05) < 4.5:
            broken.append(rule)
    return broken


def test_colours_can_be_read_in_light_and_dark_themes(make_run, make_evaluation):
    evaluation = make_evaluation(make_run())
    page = page_of(evaluation)
    css = re.search("<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert css.count("background") == 5 and unreadable(css) == []
    assert "background" not in page.replace(css, "") and not re.search(r"[;\"]color:", page.replace(css, ""))
    # the check sees what was wrong before
    assert unreadable("th{background:#f4f4f4}") and unreadable(".warn{background:#fbe3c8;padding:0}")
    assert unreadable("form{background:Canvas}")
    assert unreadable(".dim{color:#666}") and unreadable("a{background:#777;color:#888}")


def test_the_model_card_names_scores_and_settings(make_run, make_evaluation):
    run = make_run(overrides={"lora.r": 8})
    card = ModelCard(pages.model_card(run, make_evaluation(run)))
    assert card.data.base_model == "data/demo/base" and card.data.library_name == "peft"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        "ROUGE-1 (F1, 0-1, no stemmer)": 0.875,
        "ROUGE-2 (F1, 0-1, no stemmer)": 0.125,
        "ROUGE-L (F1, 0-1, no stemmer)": 0.5833,
        "sacreBLEU (0-100)": 81.25,
    }
    assert {(r.dataset_name, r.dataset_split, r.task_type) for r in card.data.eval_results} == {
        ("demo", "test", "summarization")
    }
    assert "# demo-00000001" in card.text and "rank 8, alpha 32" in card.text and "64 rows of `demo`" in card.text
    assert "| ROUGE-1 | 0.250 [0.125, 0.375] | 0.875 [0.750, 1.000] |\n| ROUGE-2 |" in card.text
    assert "n=3" in card.text and "nrefs:1|version:2.6.0" in card.text and "Not for clinical use" in card.text


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def test_the_cards_snippet_is_python_with_the_runs_own_settings(make_run, make_evaluation, tmp_path):
    run = make_run()
    (tmp_path / "data" / "demo" / "base").mkdir(parents=True)  # a local base model
    decoding = {"max_new_tokens": 48, "num_beams": 4, "length_penalty": 0.8}
    card = pages.model_card(run, make_evaluation(run, generation=decoding))
    assert "- Base model: `data/demo/base`, a folder of the repository, in 4 bits (nf4)\n- Adapted layers" in card
    code = snippet(card)
    compile(code, "card", "exec")
    assert '"../../../data/demo/base"' in code  # from inside of outputs/<run>/adapter
    assert 'bnb_4bit_quant_type="nf4"' in code and "bnb_4bit_use_double_quant=True" in code
    assert "max_new_tokens=48, num_beams=4, length_penalty=0.8" in code and "do_sample=False" in code
    assert "add_special_tokens=False" in code and '["prompt"]' in code and ".format(" not in code
    assert "revision" not in code and "resize_token_embeddings" not in code
    assert str(tmp_path) not in code


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_the_cards_snippet_pins_the_hubs_commit(make_run, make_evaluation, load_in_4bit):
    overrides = {"quantization.load_in_4bit": load_in_4bit, "pad_token": "add", "prompt.few_shot": 2}
    run = make_run("samsum-00000001", "samsum", overrides)
    runs.files.write_sealed(run.folder / "manifest.json", run.manifest | {"base_commit": "a" * 40})
    card = pages.model_card(run, make_evaluation(run, metrics=METRICS | {"dataset": "samsum"}))
    code = snippet(card)
    compile(code, "card", "exec")
    assert '"mistralai/Mistral-7B-Instruct-v0.2"' in code and f'revision="{"a" * 40}"' in code
    assert ("BitsAndBytesConfig" in code) is load_in_4bit and "resize_token_embeddings" in code
    assert "CC BY-NC-ND 4.0" in card and "2 example(s)" in card


def test_a_folded_text_is_shown_and_never_run():
    html = pages.folded("<b>settings", "r = 16\n</pre><script>")
    assert html == (
        "<details><summary>&lt;b&gt;settings</summary><pre>r = 16\n&lt;/pre&gt;&lt;script&gt;</pre></details>"
    )
