"""The commands of a conversion, as a user types them."""

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nsa_fsa import cli
from nsa_fsa.training import commands


def run_command(name, *arguments, code=0):
    """What a command prints, without line breaks."""
    found = CliRunner().invoke(
        cli.app, [name, *map(str, arguments)], env={"COLUMNS": "300", "TERM": "dumb"}
    )
    assert found.exit_code == code, found.output
    return " ".join(found.output.replace("│", " ").split())


def widen_console_and_hide_gpu(patch):
    patch.setattr(commands.console, "width", 300)
    patch.setattr(torch.cuda, "is_available", bool)


def forbid_loading(patch):
    """A model that is loaded fails the test."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    patch.setattr(AutoModelForCausalLM, "from_pretrained", load)
