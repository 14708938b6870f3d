"""``optimum-cli arb COMMAND``: the commands of ``arb-hf``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

import arb_hf_start
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class ArbCommand(BaseOptimumCLICommand):
    """``arb-hf``'s parser and commands, under the name that optimum gives them."""

    COMMAND = CommandInfo(name="arb", help="Make, measure and publish binary language models (arb_hf).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        arb_hf_start.parser().add_commands(parser, sys.argv[2:] if sys.argv[1:2] == ["arb"] else ())

    def run(self) -> None:
        sys.exit(arb_hf_start.parser().execute(self.args))


REGISTER_COMMANDS = [ArbCommand]
