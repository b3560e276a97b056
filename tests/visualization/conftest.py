import shutil

import pytest

from pml_ext.visualization import retrieval_report
from tests.needs import needs
from tests.visualization.report_pages import Page


@pytest.fixture
def report(tmp_path):
    def make(*args, **kwargs):
        kwargs = {"num_points": 0, "path": tmp_path / "report.html"} | kwargs
        path = retrieval_report(*args, **kwargs)
        assert path == kwargs["path"]
        return Page(path)

    return make


@pytest.fixture(scope="module")
def browser():
    sync_api = needs("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end nothing may have been logged, failed or loaded from elsewhere."""
    contexts, wrong = [], []

    def make(path, width=1280, scheme="light", js=True):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            java_script_enabled=js,
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.goto(path.as_uri())
        return page

    yield make
    for context in contexts:
        context.close()
    assert wrong == []
