"""The example of the guide runs as it stands."""

import ast
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "networking.md"


def test_the_example(testbed):
    lines = GUIDE.read_text().splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    app = testbed.portal.run(testbed.make_app("tiny"))
    names = {"app": app}
    example = eval(compile(code, GUIDE, "exec", flags), names)  # noqa: S307 - our own
    testbed.portal.run(example)
    work = names["work"]
    output, _ = testbed.portal.run(work.run_for_stdio("ls /sys/class/net"))
    assert output == b"lo\n"
    assert testbed.portal.run(testbed.close_app(app)) == []
