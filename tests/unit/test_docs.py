"""The documentation says what the code does."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from bot import model, orders, wire
from bot.config import Config
from tests.drill.test_health import ALL, FAULTS, LOOPS

ROOT = Path(__file__).resolve().parents[2]
DECODERS = {"ticks": wire.decode_tick, "signals": wire.decode_signal, "reports": wire.decode_report}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_generated_docs_with_the_code_as_it_is_are_up_to_date():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_generate_with_a_stale_page_says_which(tmp_path):
    # A copy beside which nothing was generated yet.
    for name in ("generate.py", "architecture.md"):
        (tmp_path / name).write_text(read(f"docs/{name}"))
    done = subprocess.run([sys.executable, str(tmp_path / "generate.py"), "--check"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "config.md is out of date" in done.stderr and "wire.md is out of date" in done.stderr


def test_wire_page_with_its_examples_decodes():
    sections = re.split(r"## Messages on (\w+)", read("docs/wire.md"))
    seen = set()
    for channel, text in zip(sections[1::2], sections[2::2], strict=True):
        example = r"### (\w+).*?Example: `(.*?)`\n\n```\n(.*?)```"
        for name, shown, dump in re.findall(example, text, re.DOTALL):
            raw = bytes.fromhex(dump)
            assert msgspec.msgpack.decode(raw) == msgspec.json.decode(shown), name
            if name != "instrument":  # it travels inside a snapshot
                assert wire.encode(DECODERS[channel](raw)) == raw
            seen.add(name)
    assert seen == {cls.__struct_config__.tag for cls in model.Message.__subclasses__()}


def test_config_page_with_every_key_explains_it():
    page = read("docs/config.md")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", page, re.MULTILINE)
    assert [key for key, why in rows if len(why) < 8] == [], "a key without a reason"
    tables = set(re.findall(r"(\w+)(?:\.NAME)?\]`$", page, re.MULTILINE))
    for name, value in msgspec.json.schema(Config)["$defs"].items():
        assert set(value["properties"]) <= {key for key, _ in rows} | tables, name


def test_architecture_page_with_the_order_table_has_every_state():
    page = read("docs/architecture.md")
    for state in orders.TABLE:
        assert f"| {state} |" in page


def test_architecture_page_with_the_users_words_names_what_is_there():
    row = r"^\| [\w, ]+ \| (.*`.*) \| `(bot/\w+\.py)` \|$"
    rows = re.findall(row, read("docs/architecture.md"), re.MULTILINE)
    assert len(rows) >= 8
    for names, path in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(class|def) {name}\b", read(path)), f"{name} is not in {path}"


@pytest.mark.parametrize("page", ["README.md", "RUNBOOK.md", "CHANGELOG.md", "docs/architecture.md",
                                  "docs/decisions.md", "docs/wire.md", "docs/config.md", "docs/metrics.md",
                                  "docs/logs.md", "docs/drills.md", "docs/faults.md"])
def test_page_with_paths_names_files_that_exist(page):
    text = read(page)
    assert text.strip()
    for path in re.findall(r"`((?:bot|ops|docs|tests|systemd|ansible)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"
    for path in re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", text):
        assert ((ROOT / page).parent / path).exists(), f"{page} links {path}"


def test_table_of_faults_has_each_in_each_process():
    rows = re.findall(r"^\| (.+?) \| ([\w-]+) \| .+? \| .+ \|$", read("docs/faults.md"), re.MULTILINE)[2:]
    assert sorted(rows) == sorted((f, p) for f in (*FAULTS, *LOOPS) for p in ALL), "make drill writes it"


def test_readme_with_its_config_snippet_is_toml():
    snippets = re.findall(r"```toml\n(.*?)```", read("README.md"), re.DOTALL)
    assert snippets and all(map(tomllib.loads, snippets))


def test_promises_with_the_tests_that_keep_them_name_only_tests_that_are_there():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", read("docs/architecture.md"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 13))
    there = {name for path in (ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)}
    for number, _, tests in rows:
        named = set(re.findall(r"`(test_\w+)`", tests))
        assert len(named) >= 2 and named <= there, f"promise {number}: {named - there or 'too few'}"
