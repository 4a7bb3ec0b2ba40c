"""The report of a run, in a real browser: what a person sees and can do.

Without a network, as the sandbox has none.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import timeline_samples
from report_reader import Reader, browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from qubes_itests.html_report.page import write_report

#: How many the sample has.
TESTS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the run.json of a sample run, and where its report is."""
    directory = tmp_path_factory.mktemp("report")
    told = timeline_samples.write(directory, tests=TESTS, seed=3)
    return told, write_report(directory)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Start a browser, once."""
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def reader(opened, run):
    """Whoever opens the report; the console must stay empty."""
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    opened.get_log("browser")
    somebody = Reader(opened, run[1])
    yield somebody
    assert somebody.problems() == []


def outcomes(run, *names):
    return [test for test in run[0]["tests"] if test["outcome"] in names]


def test_the_overview_says_what_failed_and_where_the_time_went(reader, run):
    reader.open()
    bad = outcomes(run, "failed", "error", "flaky")
    shown = [link.text for link in reader.all(".failures button")]
    assert sorted(shown) == sorted(test["test"] for test in bad)
    causes = reader.text(".failures")
    assert all(test["cause"].partition("\n")[0] in causes for test in bad)
    phases = [cell.text for cell in reader.all(".times:first-of-type th")]
    assert phases[:3] == ["setUp", "test", "tearDown"]
    assert reader.text("#shown") == f"{TESTS} tests"


def test_each_worker_has_a_row_of_its_tests_and_of_the_time_it_was_idle(reader, run):
    reader.open()
    told = [test for test in run[0]["tests"] if test["duration"]]
    rows = [row.text.split()[:3] for row in reader.all(".worker")]
    counts = Counter(test["worker"] for test in told)
    for name, row in zip(("gw0", "gw1"), rows, strict=False):
        assert row == [name, str(counts[name]), "tests" + "," * (len(row[2]) > 5)]
    idle = max(reader.all(".worker .idle"), key=lambda gap: gap.rect["width"])
    assert idle.get_attribute("title").startswith("idle for 15.")
    row = idle.find_element(By.XPATH, "../..").text
    assert 15 <= float(re.search(r"idle for ([\d.]+) s", row)[1]) < 60
    bars = reader.all(".worker .busy")
    assert len(bars) == len(told)
    spans = [(b.rect["x"], b.rect["x"] + b.rect["width"]) for b in bars]
    track = reader.one(".worker .track").rect
    for begin, end in spans:
        assert track["x"] - 1 <= begin < end <= track["x"] + track["width"] + 1
    slowest = max(told, key=lambda test: test["duration"])
    widest = max(bars, key=lambda bar: bar.rect["width"])
    assert widest.get_attribute("title").startswith(slowest["test"])
    widest.click()
    reader.until(lambda: reader.text("main h2 .id") == slowest["test"])


def test_what_earlier_runs_came_to_is_shown(reader, run):
    reader.open()
    mixed = [t for t in run[0]["tests"] if {"passed", "failed"} <= {*t["earlier"]}]
    section = "section:has(h3):nth-last-of-type(2)"
    assert reader.text(f"{section} h3") == "What passes now and then"
    links = [link.text for link in reader.all(f"{section} button")]
    assert sorted(links) == sorted(test["test"] for test in mixed)
    test = mixed[0]
    counted = [outcome for outcome in test["earlier"] if outcome != "skipped"]
    words = f"passed in {counted.count('passed')} of {len(counted)} earlier runs"
    (row,) = [r for r in reader.all(f"{section} tr") if test["test"] in r.text]
    assert words in row.text
    marks = row.find_elements(By.CSS_SELECTOR, ".earlier .mark")
    assert [mark.get_attribute("data-outcome") for mark in marks] == test["earlier"]
    reader.open(f"#{test['test']}")
    reader.until(lambda: words in reader.text(".heading"))
    new = next(t for t in run[0]["tests"] if not t["earlier"] and t["duration"])
    reader.open(f"#{new['test']}")
    reader.until(lambda: reader.text("main h2 .id") == new["test"])
    assert "earlier" not in reader.text(".heading")


def test_the_list_is_filtered_by_words_and_by_outcomes(reader, run):
    reader.open()
    reader.press("/")
    reader.press("TC_01 test_03")
    reader.until(lambda: reader.text("#shown") == f"1 of {TESTS} tests")
    reader.press(*[Keys.BACKSPACE] * 13)
    reader.until(lambda: reader.text("#shown") == f"{TESTS} tests")
    reader.one('#outcomes [data-outcome="passed"]').click()
    others = TESTS - len(outcomes(run, "passed"))
    reader.until(lambda: reader.text("#shown") == f"{others} of {TESTS} tests")
    marks = reader.all("#tests .mark")
    assert {mark.get_attribute("data-outcome") for mark in marks} == {
        test["outcome"] for test in run[0]["tests"]
    } - {"passed"}


def test_a_failed_test_shows_the_call_that_failed(reader):
    reader.open_failed()
    details = reader.until(lambda: reader.text(".details"))
    assert "rve < /home/user/words" in details
    assert "127: command not found" in details
    assert "bash: line 1: rve: command not found" in details
    assert "tests/test_split.py:64" in details
    assert "done = await vm.run_for_stdio(command)" in details
    assert "user" in details
    assert reader.text("pre.cause.bad")


def test_a_link_names_a_test(reader, run):
    test = outcomes(run, "passed")[3]["test"]
    reader.open(f"#{test}")
    reader.until(lambda: reader.text("main h2 .id") == test)
    assert reader.text('#tests [aria-selected="true"] b') == test.rpartition("::")[2]


def test_each_vm_has_a_lane_and_calls_are_arrows_between_them(reader):
    reader.open_failed()
    assert [name.text for name in reader.all("text.name")] == [
        *("phases", "client", "server", "vault"),
    ]
    assert len(reader.all("path.memory")) == 3
    assert len(reader.all(".arrow.allow")) > 3
    assert reader.all("rect.state.Running")


def test_each_call_is_together_with_the_decision_about_it(reader):
    """So only those that were denied have a line of their own."""
    reader.open_failed()
    reader.until(lambda: reader.all("#actions .item"))
    assert reader.all("#actions .dot.service")
    assert not reader.all("#actions .dot.policy:not(.deny)")


def test_a_test_without_a_timeline_says_how_to_get_one(reader, run):
    test = outcomes(run, "skipped")[0]["test"]
    reader.open(f"#{test}")
    reader.until(lambda: reader.text("main h2 .id") == test)
    assert "--trace=on" in reader.text("main .note")


def test_of_a_flaky_test_the_attempt_that_failed_is_shown_first(reader, run):
    test = outcomes(run, "flaky")[0]["test"]
    reader.open(f"#{test}")
    details = reader.until(lambda: reader.text(".details"))
    assert "127: command not found" in details
    assert "1 of 2 attempts failed" in reader.text(".facts")
    choice = Select(reader.one(".heading select"))
    assert choice.first_selected_option.text == "attempt-1"
    choice.select_by_visible_text("the last")
    reader.until(lambda: "start in " in reader.text(".details"))
    assert (
        Select(reader.one(".heading select")).first_selected_option.text == "the last"
    )


def test_a_click_on_an_arrow_shows_the_call_and_its_rule(reader):
    reader.open_failed()
    reader.until(lambda: reader.all(".arrow.allow"))
    hit = reader.one(".arrow.allow .hit")
    ActionChains(reader.browser).click(hit).perform()
    details = reader.until(lambda: reader.text(".details"))
    assert "service in " in details
    assert "30-user.policy:4" in details


def test_a_range_filters_actions_and_every_log(reader):
    reader.open_failed()
    lanes = reader.until(lambda: reader.one(".lanes"))
    everything = int(reader.text("#tab-console").split()[1])
    assert everything > 0
    width = lanes.size["width"]
    drag = ActionChains(reader.browser)
    drag.move_to_element_with_offset(lanes, -width // 2 + 140, 90)
    drag.click_and_hold().move_by_offset(120, 0).release().perform()
    reader.until(lambda: reader.text(".row.bar").startswith("Selected: 0."))
    begin, end = reader.js(
        "[...document.querySelectorAll('.handle')].map(h => h.ariaValueNow)"
    )
    reader.one("#tab-console").click()
    some, of = map(int, reader.text("#tab-console").split()[1].split("/"))
    assert 0 < some < of == everything
    for row in reader.all("#lines .when"):
        assert float(begin) <= float(row.text) <= float(end)
    for row in reader.all("#actions .when"):
        assert float(row.text) <= float(end)
    reader.press("z")
    reader.press(Keys.ESCAPE)
    reader.until(lambda: reader.text("#tab-console") == f"Console {everything}")


def test_the_range_is_set_by_keys(reader):
    reader.open_failed()
    handle = reader.until(lambda: reader.one(".handle.end"))
    before = float(handle.get_attribute("aria-valuenow"))
    handle.send_keys(Keys.SHIFT + Keys.ARROW_LEFT)
    after = float(handle.get_attribute("aria-valuenow"))
    assert after == pytest.approx(before * 0.9, rel=0.01)
    assert reader.text(".row.bar").startswith("Selected: 0.000 s to ")


def test_the_whole_page_is_used_by_keys(reader):
    """From the filter through the list into a call and back to the overview."""
    reader.open()
    reader.press("/")
    reader.press("rve")
    first = reader.until(lambda: reader.one("#tests .item"))
    name = first.find_element(By.TAG_NAME, "b").text
    for _ in range(30):
        if reader.js("document.activeElement.id") == "tests":
            break
        reader.press(Keys.TAB)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert reader.js(outline) == "solid"
    reader.press(Keys.ARROW_DOWN)
    reader.until(lambda: name in reader.text("main h2"))
    for _ in range(60):
        if reader.js("document.activeElement.id") == "actions":
            break
        reader.press(Keys.TAB)
    reader.press(Keys.HOME)
    reader.until(lambda: "start in test-inst-client" in reader.text(".details"))
    reader.press(Keys.ENTER)
    reader.until(lambda: reader.text(".row.bar").startswith("Selected: "))
    reader.press("?")
    assert reader.one("#help").is_displayed()
    reader.press(Keys.ESCAPE)
    assert not reader.one("#help").is_displayed()
    reader.press("o")
    reader.until(lambda: reader.all(".failures"))


#: The least ratio of the contrast of each text with what is behind it.
CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0.9) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || !e.checkVisibility() || e.disabled) continue;
    if (e.closest("svg, script")) continue;
    const [one, two] = [parse(getComputedStyle(e).color), ground(e)].map(light);
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${e.tagName} ${e.className}`);
  }
  return bad;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(reader, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    media = {"features": [feature]}
    reader.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    reader.open()
    dark = reader.js("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    assert reader.js(CONTRAST) == []
    reader.open_failed()
    assert reader.js(CONTRAST) == []
    ground = reader.js("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_only_what_is_seen_of_long_lists_exists(reader):
    reader.open_failed()
    assert len(reader.all("#tests .item")) < TESTS
    box = reader.one("#tests")
    reader.js("arguments[0].scrollTop = 1e6", box)
    reader.until(lambda: reader.all(f'#tests [aria-posinset="{TESTS}"]'))


@pytest.mark.parametrize("width", [400, 700, 1000, 2000])
def test_nothing_is_wider_than_the_window(reader, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    reader.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        reader.open()
        assert reader.js("document.documentElement.scrollWidth") <= width
        reader.open_failed()
        assert reader.js("document.documentElement.scrollWidth") <= width
    finally:
        reader.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_hostile_text_does_nothing(reader, tmp_path):
    """Neither as a name nor as a line does it become part of the page."""
    evil = "</script><img src=x onerror=document.title='evil'><b>"
    timeline_samples.write(tmp_path, tests=1, seed=3)
    for path in (tmp_path / "run.json", *tmp_path.glob("*/timeline.jsonl")):
        text = path.read_text()
        for name in ("inst-client", "qubes.Gpg2", "systemd", "test_split"):
            text = text.replace(name, evil.replace('"', "'"))
        path.write_text(text)
    reader.path = write_report(tmp_path)
    reader.open()
    reader.press("j")
    reader.until(lambda: reader.all(".lanes text.name"))
    assert evil[:8] in reader.text("#actions")
    assert reader.all("img") == []
    assert reader.js("document.title") != "evil"
