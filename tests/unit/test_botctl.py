"""botctl's table of verbs: each has help with an example that can be typed, and a schema for scripts."""

import shlex

import pytest

from bot import botctl
from bot.botctl import GROUPS, VERBS
from tests.schemas import SCHEMAS

each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)


def test_verbs_with_json_have_a_schema_each():
    assert {verb.name for verb in VERBS} == set(SCHEMAS)


def said(capsys, code: int, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        botctl.main(list(words))
    assert ended.value.code == code
    return "".join(capsys.readouterr())


@each_verb
def test_help_of_a_verb_shows_an_example_that_can_be_typed(verb, capsys):
    text = said(capsys, 0, *verb.name.split(), "--help")
    example = f"botctl {verb.name} {verb.example}".rstrip()
    assert f"example: {example}" in " ".join(text.split()) and "--json" in text and "--config" in text
    assert verb.text[:20].lower() in text.lower()
    assert botctl._parser().parse_args(shlex.split(example)[1:]).run is verb.run


@each_verb
def test_wrong_usage_of_a_verb_shows_what_is_right(verb, capsys):
    words = shlex.split(f"{verb.name} {verb.example}")
    text = said(capsys, 2, *words, "--nonsense")
    assert text.startswith(f"usage: botctl {verb.name} [-h]") and "--nonsense" in text


@pytest.mark.parametrize("word", sorted({verb.name.split()[0] for verb in VERBS}))
def test_help_lists_each_word_and_says_what_exit_codes_mean(word, capsys):
    text = said(capsys, 0, "--help")
    assert f"\n    {word}" in text and "exit codes: 0 done" in text
    if word in GROUPS:
        assert f"example: botctl {word} " in said(capsys, 0, word, "--help")
        assert "the following arguments are required: " in said(capsys, 2, word)


@pytest.mark.parametrize(("words", "right"), [
    ("stauts", "choose from"), ("", "VERB"), ("explain", "ID"), ("adopt", "SYMBOL"),
    ("config chekc", "choose from"),
    ("halt --strategy a --symbol b", "not allowed with"), ("orders --count 0", "a count is 1 or more"),
    ("report --since yesterday", "like 24h"), ("explain ''", "botctl signals lists some")])
def test_wrong_usage_says_what_is_right(words, right, capsys):
    assert right in said(capsys, 2, *shlex.split(words))
