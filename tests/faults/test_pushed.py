"""What is pushed to the hub says nothing of this machine's folders."""

import json

from tiny_runs import call

from vsae_jax.interop import hub


def test_no_absolute_path_is_pushed(tiny_run, tiny_rows, tmp_path):
    for to in ("saelens", "vsae_jax"):
        out = tmp_path / to
        assert call("convert", input=tiny_run, to=to, out=out) == 0
        here = {p: p.read_text() for p in out.rglob("*.json")}
        assert any(str(tiny_rows) in text for text in here.values())
        for path in here:
            pushed = hub.content(path).decode()
            assert str(tiny_rows.parents[2]) not in pushed
            assert json.loads(pushed).keys() == json.loads(here[path]).keys()
        card = (out / "README.md").read_text()
        assert str(tiny_rows.parents[2]) not in card
        weights = next(out.glob("*.safetensors"))
        assert hub.content(weights) == str(weights)
