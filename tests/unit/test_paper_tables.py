"""The paper exchange's tables: nothing in them that nobody reads, and everything that is read in them."""

import re
import tomllib
from configparser import ConfigParser

import pytest

from bot.paper_model import BRACKETS, FILTERS, ROWS
from bot.paper_rest import ANSWERS, PARAMETERS, ROUTES, VALUES, Request
from tests.harness import ROOT

TABLES = tomllib.loads((ROOT / "bot/paper.toml").read_text(encoding="utf-8"))


def test_tables_with_their_readers_are_all_read_and_shipped():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bot").glob("paper*.py"))
    assert [name for name in TABLES if f'table("{name}"' not in sources] == []
    made = {f"{kind}_event" for kind in ("order", "algo")} | {"account_2", "account_3", *FILTERS}
    assert [name for name in ROWS.keys() - made if f'"{name}"' not in sources] == []
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "paper.*" in setup["options.package_data"]["bot"], "or no wheel has it, nor the schema"


@pytest.mark.parametrize(("name", "route"), ROUTES.items())
def test_route_with_its_words_names_one_function_and_a_weight(name, route):
    method, path = name.split(" ")
    assert method in ("GET", "POST", "PUT", "DELETE")
    assert path.startswith(("/fapi/v", "/sapi/v"))
    assert route.security in ("none", "key", "signed")
    words = [word for word in (route.do, route.each, route.every) if word]
    assert words or route.says is not None, "do, each or every, or at least says"
    assert len(words) <= 1 and not (route.says is not None and (route.each or route.every))
    assert all(callable(getattr(Request, word, None)) != (word in ANSWERS) for word in words), "in one place"
    assert route.of is None or route.do


def test_answers_of_one_expression_are_all_named():
    assert {word for route in ROUTES.values() for word in (route.do, route.each, route.every)} >= {*ANSWERS}


def test_names_of_the_websocket_order_api_mean_one_endpoint_each():
    names = [name for route in ROUTES.values() for name in route.ws]
    assert len(names) == len(set(names)) == 19


def test_parameters_with_their_kinds_can_be_made():
    assert {kind for _, _, kind in PARAMETERS.values()} | {"integer"} == set(VALUES)


def test_brackets_with_rising_notional_allow_less_and_join_without_a_step():
    for below, above in zip(BRACKETS, BRACKETS[1:]):
        assert below.notional_cap < above.notional_cap
        assert below.initial_leverage > above.initial_leverage
        more = above.maint_margin_ratio - below.maint_margin_ratio
        assert above.cum == below.cum + below.notional_cap * more


def test_rows_with_their_words_name_what_is_known_or_are_constant():
    words = [word for row in ROWS.values() for word in row.values() if "$" in str(word)]
    assert words and all(re.fullmatch(r"\$[A-Za-z0-9_]+", word) for word in words)


def test_letters_of_the_ticker_name_each_field_once():
    letters = TABLES["letters"]["ticker"]
    assert len(set(letters.values())) == len(letters)
