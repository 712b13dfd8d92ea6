"""The workbench in a real browser, driven by selenium. Skipped where there is no Chromium or Chrome with its driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workbench.workbench_helpers import TEXT, asked, serving, tokens, workbench

from steer.directions.text import plan_from_text
from steer.intervene import Plan
from steer.workbench import WorkbenchServer

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, of the extra `dev`, drives the browser")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
SECONDS = 60


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or shutil.which("chromedriver") is None:
        pytest.skip(f"no browser with its driver on the PATH (looked for {', '.join(BROWSERS)}, chromedriver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument("--window-size=1280,1000")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """The page of a workbench, by the ids of its parts."""

    def __init__(self, driver: Any, server: WorkbenchServer) -> None:
        self.driver = driver
        driver.get(server.url)
        self.until(lambda: self.value("text") != "")

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def value(self, name: str) -> str:
        return self[name].get_property("value")

    def until(self, condition: Callable[[], Any]) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: condition())

    def until_answered(self) -> None:
        def is_answered() -> bool:
            is_over = self.all("#steered .summary") or not self["error"].get_property("hidden")
            return bool(self["stop"].get_property("disabled") and is_over)

        self.until(is_answered)

    def put(self, name: str, value: object) -> None:
        """What a user's hand does: sets a field and leaves it."""
        script = "arguments[0].value = arguments[1]; for (const type of ['input', 'change']) arguments[0].dispatchEvent(new Event(type))"
        self.driver.execute_script(script, self[name], str(value))

    def slide(self, term: int, value: float) -> None:
        script = "arguments[0].value = arguments[1]; for (const type of ['input', 'change']) arguments[0].dispatchEvent(new Event(type))"
        self.driver.execute_script(script, self.all(".term")[term].find_element("css selector", "input[type=range]"), value)

    def said(self, side: str) -> str:
        return "".join(token.get_property("textContent") for token in self.all(f"#{side} > .said .token"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


def expected(side: str, text: str, **more: Any) -> str:
    """What a workbench like that of the page says, which may be busy itself."""
    bench = workbench()
    events: list[dict[str, Any]] = []
    bench.answers(asked(text, **more), events.append)
    return "".join(token["text"] for token in tokens(events, side))


def test_a_prompt_is_answered_and_every_control_does_what_it_says(driver: Any, tmp_path: Path) -> None:
    bench = workbench(folder=tmp_path / "plans", max_new_tokens=5)
    with serving(bench) as server:
        page = Page(driver, server)
        # nothing runs before it is asked for
        assert page.value("text") == TEXT and page["model"].text and not page.all(".token")
        page["prompt"].send_keys("where is the cat")
        page["run"].click()
        page.until_answered()
        assert page.said("plain") == expected("plain", TEXT) and page.said("steered") == expected("steered", TEXT)
        # colours, what they mean, and where the plan acted
        assert "class gaps" in page["legend"].text and "layers.0.output" in page["legend"].text
        coloured = page.all("#steered > .said .token.plus, #steered > .said .token.minus")
        assert len(coloured) == 4 and all("class gaps; warm, cold acted on it" in token.get_property("title") for token in coloured)
        assert len(page.all("#steered > .said .token.acted")) == 4 and not page.all("#plain .token.acted")
        background = "return getComputedStyle(arguments[0]).backgroundColor"
        assert driver.execute_script(background, coloured[0]) != driver.execute_script(background, page["steered"])
        assert [row.text for row in page.all("#fired tbody tr")] == ["warm 0 of 6 4 of 4", "cold 6 of 6 4 of 4"]
        # the keyboard reaches the value of every token
        page.all("#steered > .said")[0].send_keys("\ue014")  # arrow to the right
        assert "class gaps; warm, cold acted" in page["steered-readout"].text
        # a slider, a scope and a layer are moved: the plan is another, and is answered at once
        page.slide(0, -3)
        page.until(lambda: page.value("text").startswith("-3 warm"))
        page.put("scope-0", "response[:2]")
        page.until(lambda: "@response[:2]" in page.value("text"))
        page.put("site-0", 1)
        text = "-3 warm:layers.1.output@response[:2] - 2 cold:layers.1.output@all"
        page.until(lambda: page.value("text") == text)
        steered = expected("steered", text)
        page.until(lambda: page.said("steered") == steered)
        page.until_answered()
        # copied and saved plans are what is on the screen
        page["copy-text"].click()
        page.until(lambda: page["copied"].text.endswith(text))
        page["copy-command"].click()
        page.until(lambda: "steer say" in page["copied"].text and "where is the cat" in page["copied"].text)
        page["save"].click()
        page.until(lambda: "plan_1.safetensors" in page["copied"].text)
        saved = Plan.load(tmp_path / "plans" / "plan_1.safetensors")
        assert saved.explain() == plan_from_text(text, bench._names).explain()
        assert page.complaints() == []


def test_a_bad_plan_is_explained_where_it_was_written_and_nothing_runs_with_it(driver: Any) -> None:
    with serving(workbench(prompts=["who"], max_new_tokens=3)) as server:
        page = Page(driver, server)
        page.until_answered()
        before = page.said("steered")
        page.put("text", "0.4 wram@response")
        page.until(lambda: not page["error"].get_property("hidden"))
        assert "ConfigError: no direction is called 'wram'" in page["error"].text and "did you mean 'warm'?" in page["error"].text
        assert page["text"].get_attribute("aria-invalid") == "true" and page.value("text") == "0.4 wram@response"
        page["run"].click()  # it would answer with another plan than the one that can be read on the page
        assert not page["error"].get_property("hidden") and page.said("steered") == before
        page.put("text", "0 warm")
        page.until(lambda: page["error"].get_property("hidden") and page.value("text") == "0 warm:layers.0.output@all")
        page.until(lambda: page.said("steered") == page.said("plain") != "")
        page.put("scope-0", "respons")
        page.until(lambda: "unknown" in page["error"].text or "respons" in page["error"].text)
        assert page["scope-0"].get_attribute("aria-invalid") == "true" and page.value("text") == "0 warm:layers.0.output@all"


def test_features_of_a_dictionary_colour_tokens(driver: Any) -> None:
    with serving(workbench("clamp(sae, feature=3, to=2)@generated", prompts=["who"], max_new_tokens=4)) as server:
        page = Page(driver, server)
        page.until_answered()
        assert page.value("feature") == "3" and page["feature"].is_displayed() and "activation of the feature" in page["legend"].text
        page.put("feature", 10**6)
        page.until(lambda: "feature of 'sae'" in page["error"].text)
        page.put("reading", -1)
        page.until_answered()
        page.until(lambda: page["legend"].text == "" and not page["feature"].is_displayed())


def test_an_answer_is_stopped_from_the_page(driver: Any) -> None:
    bench = workbench(max_new_tokens=2000)
    with serving(bench) as server:
        page = Page(driver, server)
        page["prompt"].send_keys("who")
        page["run"].click()
        page.until(lambda: len(page.all("#plain > .said .token")) > 3)
        page["stop"].click()
        page.until(lambda: page["stop"].get_property("disabled"))
        assert 3 < len(page.all("#plain > .said .token")) < 2000 and "stopped" in page.all("#plain .summary")[0].text
        assert not bench._generating.locked()


def test_text_of_a_model_or_a_user_is_never_markup(driver: Any) -> None:
    bench = workbench(prompts=[HOSTILE, "who"], max_new_tokens=3)
    convert = bench._tokenizer.decode
    bench._tokenizer.decode = lambda ids, **more: convert(ids, **more) + HOSTILE * len(ids)
    with serving(bench) as server:
        page = Page(driver, server)
        page.until_answered()
        assert HOSTILE in page.said("plain") and page.value("prompt") == HOSTILE
        page.put("text", HOSTILE)
        page.until(lambda: HOSTILE[:20] in page["error"].text)
        assert "taken" not in driver.title and not page.all("img") and len(page.all("script")) == 1


@pytest.mark.parametrize("width", [1280, 800, 420])
def test_nothing_is_wider_than_the_window(driver: Any, width: int) -> None:
    with serving(workbench("warm ?never", prompts=["where is the cat " * 10], max_new_tokens=5)) as server:
        driver.set_window_size(width, 900)
        page = Page(driver, server)
        page.until_answered()
        for part in ("html", ".side"):
            box = page.all(part)[0]
            assert driver.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", box) <= 0
        driver.set_window_size(1280, 1000)
