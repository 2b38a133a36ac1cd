"""Flags: every field is one, comma lists make a grid, and a mistake is one line."""

import dataclasses
import errno
import itertools
import signal
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.config import DemoConfig, EvalConfig, ExtractConfig, TrainConfig, cli
from vsae_jax.config.fields import REQUIRED, flag
from vsae_jax.system.errors import Interrupted, UserError


def parse(*arguments: str, config_class=TrainConfig) -> list:
    return cli.parse(config_class, ["command", *arguments])


def parsed(*arguments: str) -> TrainConfig:
    (config,) = parse(*arguments)
    return config


def run(command, *arguments: str, config_class=TrainConfig) -> int:
    return cli.run(command, config_class, ["command", *arguments])


def nothing(_configs) -> None:
    """A command with nothing to do."""


def raising(error: BaseException):
    def command(_configs):
        raise error

    return command


def test_no_flags_are_the_dataclass_defaults():
    assert parsed() == TrainConfig()
    assert parse(config_class=ExtractConfig) == [ExtractConfig()]


def test_values_have_their_fields_types():
    config = parsed(
        "--k=32", "--beta=0", "--lr=3e-4", "--variant=topk", "--out=runs/a,b", "--wandb"
    )
    expected = TrainConfig(
        k=32, beta=0.0, lr=3e-4, variant="topk", out="runs/a,b", wandb=True
    )
    assert config == expected
    assert (type(config.k), type(config.beta)) == (int, float)


@pytest.mark.parametrize(
    "text, number",
    [("1000000", 10**6), ("1_000_000", 10**6), ("1e6", 10**6), ("2.5e3", 2500)],
)
def test_whole_numbers_may_be_written_short(text, number):
    config = parsed(f"--steps={text}")
    assert config.steps == number and type(config.steps) is int


def test_a_repeated_flag_the_last_wins():
    assert parsed("--beta=1", "--k=8", "--beta=2").beta == 2
    assert len(parse("--k=8,16", "--k=4")) == 1


def test_a_value_may_stand_after_a_space():
    assert parsed("--k", "8", "--variant", "topk") == TrainConfig(k=8, variant="topk")


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--tensorboard", True),
        ("--notensorboard", False),
        ("--tensorboard=true", True),
        ("--tensorboard=0", False),
        ("--tensorboard=No", False),
    ],
)
def test_switches(argument, value):
    assert parsed("--tensorboard", argument).tensorboard is value


def test_an_unset_switch_is_not_off():
    assert parsed().relu is None
    assert parsed("--norelu").relu is False
    assert [config.relu for config in parse("--relu=0,1")] == [False, True]


@pytest.mark.parametrize(
    "argument, value",
    [("--lr=auto", "auto"), ("--lr=0.001", 1e-3), ("--input_scale=sqrt_d", "sqrt_d")],
)
def test_a_number_or_a_word(argument, value):
    assert getattr(parsed(argument), argument[2:].split("=")[0]) == value


def test_comma_lists_are_the_cross_product_in_the_flags_own_order():
    # The order of the fields, whatever the order on the command line.
    arms = parse("--seed=0,1", "--beta=0,0.5", "--k=64,128", "--lr=auto,1e-3")
    assert [(c.k, c.beta, c.lr, c.seed) for c in arms] == list(
        itertools.product((64, 128), (0.0, 0.5), ("auto", 1e-3), (0, 1))
    )
    assert len(set(arms)) == 16


def test_values_of_a_list_may_have_spaces():
    assert [config.k for config in parse("--k=4, 8")] == [4, 8]


def said(*arguments: str, config_class=TrainConfig) -> str:
    """What is said of a mistake: one line."""
    with pytest.raises(UserError) as error:
        parse(*arguments, config_class=config_class)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--bta=1", "unknown flag --bta; did you mean --beta? (see --help)"),
        ("--d-sae=64", "unknown flag --d-sae; did you mean --d_sae?"),
        ("--activation=x", "unknown flag --activation; did you mean --activations?"),
        ("--nobeta", "unknown flag --nobeta; did you mean --beta?"),
        ("--zzzzzz=1", "unknown flag --zzzzzz (see --help)"),
        ("--k=many", "flag --k=many: 'many' is not INTEGER"),
        ("--k=1.5", "flag --k=1.5: '1.5' is not INTEGER"),
        ("--k=", "flag --k=: '' is not INTEGER"),
        ("--k=64,", "flag --k=64,: '' is not INTEGER"),
        ("--steps=1e300", "flag --steps=1e300: '1e300' is not INTEGER"),
        ("--steps=inf", "flag --steps=inf: 'inf' is not INTEGER"),
        ("--steps=nan", "flag --steps=nan: 'nan' is not INTEGER"),
        ("--beta=big", "flag --beta=big: 'big' is not NUMBER"),
        ("--beta=nan", "--beta=nan must be a finite number"),
        ("--beta=0,inf", "--beta=inf must be a finite number"),
        ("--lr=fast", "flag --lr=fast: 'fast' is not NUMBER|auto"),
        ("--lr=-inf", "--lr=-inf must be a finite number"),
        ("--variant=vase", "'vase' is not relu|topk|vsae|vsae_topk|batch_topk"),
        ("--relu=maybe", "flag --relu=maybe: 'maybe' is not true|false"),
        ("--k=4,4", "a value stands twice in '4,4'"),
        ("--beta=0,0.0", "a value stands twice in '0,0.0'"),
        ("--data_seed=0,1", "'0,1' is a list; it takes one INTEGER"),
        ("--dtype=float32,bfloat16", "is a list; it takes one auto|float32|bfloat16"),
        ("--k", "Missing value for flag --k"),
        ("k=12", "unexpected argument 'k=12'; flags start with --"),
        ("topk", "unexpected argument 'topk'"),
    ],
)
def test_a_mistake_is_one_line_with_the_value_and_the_rule(argument, message):
    assert message in said(argument)


def test_every_arm_of_a_grid_is_checked():
    assert "--k=64 must not exceed --d_sae=32" in said("--k=16,64", "--d_sae=32,128")


def test_a_missing_flagfile_is_said():
    assert "nowhere.flags" in said("--flagfile=nowhere.flags")


@pytest.mark.parametrize(
    "config_class", [ExtractConfig, TrainConfig, EvalConfig, DemoConfig]
)
@pytest.mark.parametrize("flag_name", ["--help", "-h"])
def test_help_has_every_flag_with_its_help_and_default(config_class, flag_name, capsys):
    assert run(raising(AssertionError()), flag_name, config_class=config_class) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[0] and not lines[0].startswith(" ")
    for field in dataclasses.fields(config_class):
        (at,) = (
            i for i, line in enumerate(lines) if line.startswith(f"  --{field.name}=")
        )
        assert field.metadata["help"] in lines[at + 1]
        required = field.metadata.get("default_help") == REQUIRED
        assert ("(required)" if required else "(default: ") in lines[at + 1]
        assert ("comma list" in lines[at]) == field.metadata.get("grid", False)


def test_help_says_defaults_as_one_types_them():
    @dataclasses.dataclass(frozen=True)
    class Config:
        """What it is for."""

        zero: float = flag("zero", 0.0)
        off: bool = flag("off", False)
        unset: str = flag("unset", "")
        word: Literal["a", "b"] = flag("word", "b", grid=True)

    assert cli.help_text(Config).splitlines() == [
        "What it is for.",
        "",
        "flags:",
        "  --zero=NUMBER",
        "      zero (default: 0.0)",
        "  --off=true|false",
        "      off (default: false)",
        "  --unset=TEXT",
        "      unset (default: none)",
        "  --word=a|b (takes a comma list)",
        "      word (default: b)",
    ]


def test_trains_help_has_an_example_and_its_flags_in_groups():
    text = cli.help_text(TrainConfig)
    about, *groups = text.split("\n\n")
    assert "one run folder per arm" in about
    example, *groups = groups
    assert parse(*example.split()[3:])  # python -m vsae_jax.train --flag=value ...
    names = [group.splitlines()[0] for group in groups]
    assert names == [
        "data:",
        "record:",
        "autoencoder:",
        "loss:",
        "optimisation:",
        "devices:",
        "gate:",
        "thresholds:",
    ]
    assert max(group.count("  --") for group in groups) < 15


def test_the_command_gets_every_config():
    seen = []
    assert run(seen.extend, "--k=4,8") == 0
    assert [config.k for config in seen] == [4, 8]


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("k=5\n  is  odd"), 2, "error: k=5 is odd"),
        (Interrupted("saved", signal_number=signal.SIGTERM), 143, "saved"),
        (Interrupted("saved", signal_number=signal.SIGINT), 130, "saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            2,
            "error: Permission denied at '/x/y'",
        ),
        (OSError("no words"), 2, "error: no words"),
        (
            MemoryError("1 TiB"),
            2,
            "error: out of memory; lower --batch_size or --d_sae (1 TiB)",
        ),
    ],
)
def test_what_stops_a_command_is_one_line_and_a_status(error, status, line, capsys):
    assert run(raising(error)) == status
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("make", [jnp.zeros, np.zeros])
def test_a_real_allocation_that_fails_names_what_to_lower(make, capsys):
    assert run(lambda _: make((2**20, 2**30)), "--run=r", config_class=EvalConfig) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory; lower --batch_size (")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda _: 1 // 0)
    with pytest.raises(jax.errors.JaxRuntimeError):
        run(raising(jax.errors.JaxRuntimeError("INTERNAL: a bug")))


def test_two_commands_may_be_parsed_in_one_process():
    assert run(nothing) == run(nothing, "--run=r", config_class=EvalConfig) == 0
    assert run(nothing, "--run=r") == 2
