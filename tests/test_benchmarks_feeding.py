"""The benchmarks of extraction and input run on something tiny."""

import pytest
from tiny_models import make_stories, make_tiny_neox, write_jsonl

from benchmarks import extraction
from benchmarks import input as batch_input
from vsae_jax.config import cli


def test_extraction_prints_a_ratio_for_each_layer(tmp_path, capsys):
    model = make_tiny_neox(tmp_path / "lm")
    corpus = write_jsonl(tmp_path / "stories.jsonl", make_stories(50))
    flags = [f"--model={model}", f"--dataset={corpus}", "--num_tokens=512"]
    flags += ["--context_length=16", "--layer=0,1", "--rounds=2", "--batch_size=3"]
    argv = ["extraction", *flags, "--backend=jax"]
    assert cli.run(extraction.command, extraction.ExtractionConfig, argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [row for row in rows if row[0] == "jax"]
    assert [row[1] for row in table] == ["0", "1"]
    for row in table:
        median, least, most = (float(row[i]) for i in (5, 6, 8))
        assert 0 < least <= median <= most


@pytest.mark.parametrize("prefetch", [True, False])
def test_input_prints_a_row_for_each_batch_size(extracted, capsys, prefetch):
    argv = ["input", f"--activations={extracted()}", "--batch_size=16,64"]
    argv.append(f"--prefetch={prefetch}")
    assert cli.run(batch_input.command, batch_input.InputConfig, argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["16", "64"]
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)
