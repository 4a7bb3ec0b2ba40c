"""Who reads report.html in tests and benchmarks: a browser without a window."""

from __future__ import annotations

import contextlib
import shutil

from selenium import webdriver
from selenium.common.exceptions import (
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--window-size=1400,1000"),
)
#: Seconds.
DEADLINE = 300


@contextlib.contextmanager
def browser(directory):
    """Start a browser, which keeps what it keeps in a directory."""
    options = webdriver.ChromeOptions()
    for word in ARGUMENTS:
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={directory}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Named, since selenium would else ask a server of its own for one.
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    started = webdriver.Chrome(options, service)
    started.set_script_timeout(DEADLINE)
    try:
        yield started
    finally:
        started.quit()


class Reader:
    """A person with a browser.

    :param browser: of selenium.
    :param path: of the report.
    """

    def __init__(self, browser, path):
        self.browser, self.path = browser, path

    def open(self, fragment=""):
        """Open the report, at a test if its id is given."""
        self.browser.get("about:blank")
        self.browser.get(f"{self.path.as_uri()}{fragment}")
        self.until(lambda: self.all("main h2"))
        self.settled()

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def js(self, code, *arguments):
        return self.browser.execute_script(f"return {code.strip()}", *arguments)

    def press(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def until(self, condition):
        # What is asked may be drawn anew between finding and asking.
        wait = WebDriverWait(
            self.browser,
            DEADLINE,
            0.02,
            ignored_exceptions=[NoSuchElementException, StaleElementReferenceException],
        )
        return wait.until(lambda _: condition())

    def settled(self):
        """Wait until what depends on the size of something drawn has been drawn."""
        self.browser.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )

    def open_failed(self):
        """Open a test that failed from the overview, and return its id."""
        self.open()
        link = self.one(".failures li li:has([data-outcome='failed']) button")
        name = link.text
        link.click()
        self.until(lambda: self.text("main h2 .id") == name)
        self.settled()
        return name

    def problems(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]
