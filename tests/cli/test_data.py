"""The data commands."""

import json


def test_sources_as_a_table_and_as_json(gpt):
    code, out, _ = gpt("data", "sources")
    assert code == 0 and "shakespeare" in out and "public domain" in out
    rows = json.loads(gpt("data", "sources", "--json")[1])["sources"]
    assert {"name": "python-docs", "address": None}.items() <= rows[0].items()
