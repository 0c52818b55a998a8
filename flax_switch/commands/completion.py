"""flax-switch completion bash|zsh|fish"""

from __future__ import annotations

import argparse
import importlib
import sys

from flax_switch.config import one_of, shipped

SHELLS = {
    "bash": 'eval "$(flax-switch completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(flax-switch completion zsh)"  # in ~/.zshrc, after compinit',
    "fish": "flax-switch completion fish > ~/.config/fish/completions/flax-switch.fish",
}
_NAMED = ("--config", "--gin-file")  # options whose values are recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the shell."""
    parser.add_argument("shell", metavar="SHELL", help=f"{', '.join(SHELLS)}. To use it: {'; '.join(SHELLS.values())}")


def run(args: argparse.Namespace) -> int:
    """Prints the shell's script, with every command, option, field, control and recipe that this version has."""
    one_of("SHELL", args.shell, tuple(SHELLS))
    from flax_switch.cli import COMMANDS

    options = {command: sorted(options_of(command)) for command in COMMANDS}
    sys.stdout.write({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](options, COMMANDS))
    return 0


def options_of(command: str) -> list[str]:
    """Returns every option that a command takes, fields and controls included."""
    from flax_switch import cli

    parser = cli.subparser(command)
    plain = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    controls = getattr(importlib.import_module(f"flax_switch.commands.{command}"), "control_options", dict)()
    return [*plain, *parser.get_default("overrides_taken").values(), *controls]


def _bash(options: dict[str, list[str]], commands: dict[str, str]) -> str:
    cases = "\n".join(f'    {command}) words="{" ".join(names)}" ;;' for command, names in options.items())
    return f"""\
_flax_switch() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))
    return
  fi
  case "$before" in
    {"|".join(_NAMED)}) COMPREPLY=($(compgen -W "{" ".join(shipped.names())}" -- "$word") $(compgen -f -- "$word")); return ;;
  esac
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o default -F _flax_switch flax-switch
"""


def _zsh(options: dict[str, list[str]], commands: dict[str, str]) -> str:
    """Returns zsh's completion, which reads bash's functions."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(options, commands)}"


def _fish(options: dict[str, list[str]], commands: dict[str, str]) -> str:
    lines = ["complete -c flax-switch -n __fish_use_subcommand -f"]
    for command, about in commands.items():
        quoted = about.replace("'", "\\'")
        lines.append(f"complete -c flax-switch -n __fish_use_subcommand -f -a {command} -d '{quoted}'")
        for name in options[command]:
            values = f" -x -a '{' '.join(shipped.names())}'" if name in _NAMED else ""
            lines.append(f"complete -c flax-switch -n '__fish_seen_subcommand_from {command}' -l '{name[2:]}'{values}")
    return "\n".join(lines) + "\n"
