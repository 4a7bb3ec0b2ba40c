"""What shells complete, and the manual page: both are made of our tables."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess

import pytest
from terminal_user import TerminalUser

from qubes_itests.cli.arguments import ALL_OPTIONS, COMMANDS, parse
from qubes_itests.cli.completion import execute as completion
from qubes_itests.cli.man import execute as man
from qubes_itests.run.settings import ConfigurationError, Settings

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
SET_UP = {"bash": "", "zsh": "autoload -U compinit; compinit -u -D; "}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_options_and_values(tmp_path, capsys, shell):
    assert completion(parse(["completion", shell]), Settings()) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "a_folder").mkdir()
    program, *words = SHELLS[shell]
    user = TerminalUser(
        [shutil.which(program), *words], tmp_path, {**os.environ, "PS1": "$ "}
    )
    with contextlib.closing(user):
        evaluate = 'eval "$(cat script)"'
        user.type(f"{SET_UP[shell]}{evaluate}; echo re''ady\r")
        user.read_until("ready")
        for typed, added in (
            ("itests comple", "tion"),
            ("itests --shell-on-fai", "lure"),
            ("./itests run --trace reta", "in-on-failure"),
            ("itests shell --artifacts a_f", "older"),
            ("itests merge a_f", "older"),
        ):
            # Ctrl-U drops what is left of the line before
            user.type(f"\x15{typed}\t")
            user.read_until(added)


def test_an_unknown_shell_is_refused():
    with pytest.raises(ConfigurationError, match=r"expected one of bash, zsh.*ksh"):
        completion(parse(["completion", "ksh"]), Settings())


def test_the_manual_page_has_all_and_is_set_without_a_warning(capsys):
    assert man(parse(["man"]), Settings()) == 0
    page = capsys.readouterr().out
    done = subprocess.run(
        ["groff", "-ww", "-man", "-Tascii", "-P-c"],
        input=page,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    text = re.sub(r".\x08", "", done.stdout)
    for name in COMMANDS:
        assert re.search(rf"(?m)^ +{name}\b", text), name
    for option in ALL_OPTIONS:
        assert re.search(rf"(?m)^ +{option.spellings()[0]}\b", text), option.name
        assert option.variable in text
