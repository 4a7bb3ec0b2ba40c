"""Files of a policy: both formats, includes, changes, and what is said of errors."""

import logging
import os
import re

import pytest
from documented import blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qubes_itests.core.policy import (
    Policy,
    PolicyError,
    PolicyFileError,
    PolicySyntaxError,
)

ALLOW = "test.Echo * work vault allow\n"


@pytest.fixture
def vms(app, template):
    for name in ("work", "vault"):
        app.add_new_vm("AppVM", name=name, label="red", template=template)
    return app.domains


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "policy.d"
    path.mkdir()
    return path


@pytest.fixture
def legacy(tmp_path):
    path = tmp_path / "policy"
    path.mkdir()
    return path


@pytest.fixture
def load(directory):
    """Write files of these names and texts, and load them."""

    def load(files):
        for name, text in files.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        policy = Policy()
        policy.load_directory(directory)
        return policy

    return load


def lines(policy):
    return [str(rule) for rule in policy._files.loaded.rules]


def decide(policy, vms, service="test.Echo", target="vault"):
    return policy.evaluate(vms._app, service, vms["work"], target)


def test_files_in_the_order_of_their_names(load):
    policy = load(
        {
            "90-z.policy": "c * @anyvm @anyvm deny\n",
            "30-b.policy": "# a comment\n\n  \t\n   # another\r\n  b * work vault ask",
            "30-a.policy": "a  +x\t@anyvm dom0 allow user=root notify=no\r\n",
            ".hidden.policy": "nonsense",
            "30-c.policy~": "nonsense",
            "README": "nonsense",
        }
    )
    assert lines(policy) == [
        "a +x @anyvm @adminvm allow user=root notify=no",
        "b * work vault ask",
        "c * @anyvm @anyvm deny",
    ]


def test_decision_names_file_and_line(load, vms, directory, caplog):
    caplog.set_level(logging.INFO, "qubes.policy")
    policy = load({"30-user.policy": f"\n# here\n{ALLOW}"})
    decision = decide(policy, vms)
    assert decision.allowed
    origin = f"{directory}/30-user.policy:3"
    assert str(decision.rule.origin) == origin
    assert caplog.messages[-1] == (
        f"test.Echo: work -> vault: allowed to vault ({origin}: {ALLOW.strip()})"
    )


def test_added_rules_come_first(load, vms):
    policy = load({"30-user.policy": ALLOW})
    policy.add_rule("test.Echo * work vault deny", first=False)
    assert not decide(policy, vms).allowed


def test_includes(load, tmp_path):
    (tmp_path / "outside").write_text("outside * a b deny\n")
    policy = load(
        {
            "include/one": "one * a b deny\n!include include/two\n",
            "include/two": "two * a b deny\n",
            "more/5.policy": "five * a b deny\n",
            "more/4.policy": "four * a b deny\n",
            "more/ignored": "nonsense\n",
            "30.policy": "!include include/one\n!include include/two\nlast * a b deny\n"
            f"!include-dir  more\n!include {tmp_path}/outside\n",
        }
    )
    names = [line.split()[0] for line in lines(policy)]
    assert names == ["one", "two", "two", "last", "four", "five", "outside"]


def test_older_format_for_a_service(load):
    policy = load(
        {
            "include/admin": "# admins\n$anyvm $adminvm allow,target=dom0,user=root\n"
            "@tag:a @default ask, default_target=work , user=u\n"
            "$include:include/rest\n$include: include/rest\n!include include/rest\n",
            "include/rest": "$type:AppVM $dispvm:x deny,notify=no\n",
            "30.policy": "!include-service admin.vm.List +a include/admin\n"
            "!include-service * * include/rest\n",
        }
    )
    rest = "@type:AppVM @dispvm:x deny notify=no"
    assert lines(policy) == [
        "admin.vm.List +a @anyvm @adminvm allow target=@adminvm user=root",
        "admin.vm.List +a @tag:a @default ask default_target=work user=u",
        *[f"admin.vm.List +a {rest}"] * 3,
        f"* * {rest}",
    ]


@pytest.mark.parametrize(
    ("line", "doubt"),
    [
        ("t * $anyvm vault allow", "keywords begin with @, unlike '$anyvm'"),
        ("t * work $default allow target=vault", "unlike '$default'"),
        ("t * work vault allow target=$adminvm", "unlike '$adminvm'"),
        ("t * work vault ask default_target=a!b", "'a!b' is no name of a VM"),
        ("t * uuid:1 vault allow", "'uuid:1' is no name of a VM"),
        ("t * @tag:a/b vault allow", "'@tag:a/b' lacks a valid name behind @tag:"),
        ("t * work @dispvm:$x allow", "'$x' is no name of a VM"),
    ],
)
def test_what_speaks_of_nothing_is_no_error_in_a_file(load, caplog, line, doubt):
    """Qubes OS takes such lines: other rules go on, and somebody is told."""
    policy = load({"30.policy": f"{line}\nt * a b allow user=x;y\n"})
    assert (policy.error, len(lines(policy))) == (None, 2)
    assert doubt in caplog.text
    assert "30.policy:1" in caplog.text
    with pytest.raises(PolicySyntaxError, match=re.escape(doubt)):
        Policy([line])


def test_a_directive_of_the_older_format_is_written_as_in_qubes_os(load):
    with pytest.raises(PolicySyntaxError, match="SERVICE ARGUMENT SOURCE"):
        load(
            {
                "include/a": "@include:include/b\n",
                "include/b": "",
                "30.policy": "!include-service t * include/a\n",
            }
        )


def test_policy_of_qubes_4_0(load, legacy, caplog):
    caplog.set_level(logging.INFO, "qubes.policy")
    (legacy / "test.Echo").write_text("$anyvm $default allow,target=vault\n")
    (legacy / "test.Echo+b").write_text("$include:include/b\n")
    (legacy / "test.Echo+a").write_text("work vault ask\n")
    for name in ("no name", ".test.Echo", "test.Echo.rpmnew", "test.Echo.rpmsave"):
        (legacy / name).write_text("nonsense\n")
    (legacy / ".test.Echo.swp").write_text("nonsense\n")
    (legacy / "test.Echo+c.swp").write_text("nonsense\n")
    (legacy / "include").mkdir()
    (legacy / "include/b").write_text("work dom0 allow\n")
    policy = load({"35-compat.policy": "!compat-4.0\nlast * a b deny"})
    assert lines(policy) == [
        "test.Echo +a work vault ask",
        "test.Echo +a @anyvm @anyvm deny",
        "test.Echo +a @anyvm @adminvm deny",
        "test.Echo +b work @adminvm allow",
        "test.Echo +b @anyvm @anyvm deny",
        "test.Echo +b @anyvm @adminvm deny",
        "test.Echo * @anyvm @default allow target=vault",
        "last * a b deny",
    ]
    implied = policy._files.loaded.rules[1]
    assert str(implied.origin) == f"{legacy}/test.Echo+a (implied)"
    assert "'no name' is ignored" in caplog.text or "no name is ignored" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{ALLOW}test.Echo * work",
            "30.policy:2: policy line 'test.Echo * work': expected",
        ),
        ("\n\n!inclde x", "30.policy:3: policy line '!inclde x': the directives are"),
        ("!include", "30.policy:1: policy line '!include': !include takes 1 words"),
        ("!compat-4.0 now", "!compat-4.0 takes 0 words"),
        ("!include gone", "30.policy:1: policy line '!include gone'"),
        ("!include /dev/null", "/dev/null: it is no file"),
        ("!include-dir gone", "No such file or directory"),
        ("!include-dir 30.policy", "Not a directory"),
        ("!include-service a * gone", "it is no file"),
        ("!include-service a/b * gone", "'a/b' is no name of a service"),
        ("!include-service * +a gone", "service * goes with argument * only"),
        ("!compat-4.0", "No such file or directory"),
        ("!include 30.policy", "30.policy: it includes itself"),
        ("!include-dir .", "30.policy: it includes itself"),
        ("a * b c\0 deny", "it has a null character"),
        ("!include a\0b", "it has a null character"),
        (f"!include {'a' * 300}", "File name too long"),
    ],
)
def test_errors_say_where_and_what(load, directory, text, message):
    with pytest.raises(PolicyError) as caught:
        load({"20.policy": ALLOW, "30.policy": text})
    assert message in str(caught.value)
    assert caught.value.origin.file == f"{directory}/30.policy"
    assert len(str(caught.value)) < 1000


def test_broken_file_denies_all_but_what_was_added(load, vms, directory, caplog):
    message = "30.policy:1: policy line 'nonsense': expected SERVICE"
    policy = Policy(["test.Added * work vault allow"], directory=directory)
    with pytest.raises(PolicySyntaxError):
        load({"20.policy": ALLOW, "30.policy": "nonsense"})
    caplog.clear()
    policy.refresh()
    policy.refresh()
    assert message in decide(policy, vms).reason
    assert not decide(policy, vms).allowed
    assert decide(policy, vms, "test.Added").allowed
    (error,) = (r for r in caplog.records if r.levelno == logging.ERROR)
    assert message in error.getMessage()


def test_file_that_is_no_text(load, directory):
    (directory / "30.policy").write_bytes(ALLOW.encode() + b"\n# \xff\n")
    with pytest.raises(PolicyFileError, match=r"30\.policy: line 3 is not UTF-8"):
        load({})


def test_name_of_a_file_that_cannot_be(load):
    with pytest.raises(PolicyFileError, match=r"30-User\.policy: its name may have"):
        load({"30-User.policy": ALLOW})


def test_error_in_the_older_format_shows_the_line(load, directory):
    with pytest.raises(PolicySyntaxError) as caught:
        load({"x": "\n$anyvm $any allow", "1.policy": "!include-service a * x"})
    assert str(caught.value) == (
        f"{directory}/x:2: policy line '$anyvm $any allow': there is no keyword '@any'"
    )


def test_directives_have_no_place_in_the_older_format(load):
    with pytest.raises(PolicySyntaxError, match="the only directive here"):
        load({"x": "!compat-4.0", "1.policy": "!include-service a * x"})


def test_circle_of_two_files(load):
    with pytest.raises(PolicySyntaxError, match=r"x: it includes itself"):
        load({"x": "!include y", "y": "!include x", "1.policy": "!include x"})


def test_files_that_include_each_other_twice_over(load):
    files = {f"f{n}": f"!include f{n + 1}\n" * 2 for n in range(40)}
    with pytest.raises(PolicySyntaxError, match="more than 1000 files"):
        load({**files, "f40": "", "1.policy": "!include f0"})


def test_symbolic_link_to_itself(load, directory):
    (directory / "x").symlink_to("x")
    with pytest.raises(PolicySyntaxError, match="x: it is no file"):
        load({"1.policy": "!include x"})


def test_directory_that_is_not_there(vms, tmp_path):
    with pytest.raises(PolicyFileError, match="expected a directory"):
        Policy().load_directory(tmp_path / "gone")
    policy = Policy(directory=tmp_path / "gone")
    policy.refresh()
    assert policy.error is None
    assert decide(policy, vms).reason == "no rule of the policy matches it"


def test_empty_directory_is_warned_of(load, directory, caplog):
    (directory / "more").mkdir()
    load({"1.policy": "!include-dir more"})
    assert "more has no files of a policy" in caplog.text


def change_text(directory):
    (directory / "x").write_text(ALLOW.replace("allow", "deny "))


def add_file(directory):
    (directory / "10.policy").write_text("* * * * deny")


def remove_file(directory):
    (directory / "30.policy").unlink()


def replace_file(directory):
    (directory / "new").write_text("# nothing")
    (directory / "new").rename(directory / "x")


def break_file(directory):
    (directory / "x").write_text("test.Echo * work vault")


def remove_include(directory):
    (directory / "x").unlink()


def remove_directory(directory):
    directory.rename(directory.with_name("away"))


def change_quietly(directory):
    """Set the times back, and keep the size."""
    before = (directory / "x").stat()
    change_text(directory)
    os.utime(directory / "x", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        change_text,
        add_file,
        remove_file,
        replace_file,
        break_file,
        remove_include,
        remove_directory,
        change_quietly,
    ],
)
def test_changes_are_seen_and_undone(load, vms, directory, change):
    policy = load({"30.policy": "!include x", "x": ALLOW})
    assert decide(policy, vms).allowed
    change(directory)
    policy.refresh()
    assert not decide(policy, vms).allowed
    directory.mkdir(exist_ok=True)
    (directory / "10.policy").unlink(missing_ok=True)
    (directory / "30.policy").write_text(ALLOW)
    policy.refresh()
    assert policy.error is None
    assert decide(policy, vms).allowed


def test_files_are_not_read_again_for_nothing(load, directory):
    policy = load({"30.policy": ALLOW})
    # only then is its change old enough to be told from a later one
    while not policy._files.loaded.settled:
        policy.refresh()
    before = policy._files.loaded
    policy.refresh()
    assert policy._files.loaded is before
    (directory / "31.policy").touch()
    policy.refresh()
    assert policy._files.loaded is not before


PIECES = st.sampled_from(
    [
        *("!include", "!include-dir", "!include-service", "!compat-4.0", "x", "y", "*"),
        *("$include:x", "test.Echo", "+", "+a", "@anyvm", "$default", "work", "allow"),
        *("deny", ",", "target=work", "#", " ", " ", " ", "\n", "\n", "\r", "\0", "ä"),
        *(".", "..", "/", "@dispvm", "\u2028", "allow,user=root", "\udc80", "\ufeff"),
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text())


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.dictionaries(st.sampled_from(["1.policy", "x", "y"]), TEXTS))
def test_any_text_is_a_policy_or_a_policy_error(directory, legacy, files):
    """Whatever the files say, loading them ends in rules or in one kind of error."""
    for folder in (directory, legacy):
        for name in ("1.policy", "x", "y"):
            data = files.get(name, "").encode(errors="surrogateescape")
            (folder / name).write_bytes(data)
    policy = Policy()
    try:
        policy.load_directory(directory)
    except PolicyError as error:
        assert policy.error is error  # noqa: PT017
        assert lines(policy) == []
    else:
        assert policy.error is None


def test_examples_of_the_documents_are_a_policy(load):
    """What docs/policy.md shows as a file of a policy can be loaded as one."""
    (example,) = blocks("docs/policy.md", "policy")
    assert len(lines(load({"30.policy": example}))) == 6
