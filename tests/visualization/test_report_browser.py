import json
import re

import pytest
import torch

from pml_ext.visualization import retrieval_report
from tests.visualization.report_pages import EVIL, clusters

pytestmark = pytest.mark.browser


@pytest.fixture(params=["one run", "two runs"])
def runs(request):
    return request.param


@pytest.fixture
def opened(open_page, tmp_path):
    def make(*args, runs="one run", **kwargs):
        torch.manual_seed(0)
        embeddings, labels = clusters(150, 14)
        names = [*EVIL, *(f"a_rather_long_name_of_a_class_{i}" for i in range(10))]
        images = torch.randint(256, (150, 3, 16, 16), dtype=torch.uint8)
        files = [f"{EVIL[i % 4]}/a_rather_long_name_of_a_file_{i}.jpg" for i in range(150)]
        about = {"recipe": EVIL[1], EVIL[0]: "a_rather_long_value_without_a_space" * 3, "settings": {EVIL[2]: EVIL[1]}}
        more = {"about": about, "title": "runs/a_rather_long_name_of_a_run" + EVIL[1]}
        if runs == "two runs":
            more |= {"other": torch.randn(150, 3), "other_title": EVIL[0] * 2, "other_about": {"recipe": EVIL[0]}}
        path = tmp_path / "r.html"
        retrieval_report(embeddings, labels, images, names, path, num_queries=2, num_points=100, names=files, **more)
        return open_page(path, *args, **kwargs)

    return make


def column(page, index, table="class-table"):
    return page.eval_on_selector_all(f"#{table} tbody tr", f"rows => rows.map(row => row.cells[{index}].textContent)")


def test_browser_sorts(opened):
    page = opened()
    assert page.evaluate("typeof hacked") == "undefined"
    heads = page.locator("#class-table thead th")
    for index in range(5):
        before = heads.nth(index).get_attribute("aria-sort")
        for turn in range(2):
            if turn:  # by keyboard
                heads.nth(index).locator("button").focus()
                page.keyboard.press("Enter")
            else:
                heads.nth(index).locator("button").click()
            order = heads.nth(index).get_attribute("aria-sort")
            assert order == ("descending" if before == "ascending" else "ascending")
            before = order
            assert [heads.nth(i).get_attribute("aria-sort") for i in range(5)].count("none") == 4
            if index:
                values = [float(value.rstrip("%")) for value in column(page, index)]
                assert values == sorted(values, reverse=order == "descending") and len(set(values)) > 1
            else:
                names = [name for name in column(page, 0) if name.startswith("a_rather")]
                numbers = [int(name.rsplit("_")[-1]) for name in names]
                assert numbers == sorted(range(10), reverse=order == "descending")
    page.locator("#class-filter").fill("CLASS_3")
    assert (
        page.locator("#class-table tbody tr:visible")
        .all_text_contents()[0]
        .startswith("a_rather_long_name_of_a_class_3")
    )
    assert page.locator("#class-table tbody tr:visible").count() == 1
    page.locator("#pair-table button").nth(3).click()
    shares = [float(value.rstrip("%")) for value in column(page, 3, "pair-table")]
    assert shares == sorted(shares) and len(set(shares)) > 1


def test_browser_opens_classes_by_keyboard(opened, runs):
    page = opened(runs=runs)
    data = json.loads(page.locator("#data").text_content())
    focused = lambda: page.evaluate("document.activeElement.textContent")  # noqa: E731
    page.locator("#class-filter").focus()
    for _ in range(8):  # past the region that scrolls and five headings: one stop for all classes
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "class-link":
            break
    first, second = (page.locator("#class-table .class-link").nth(i).text_content() for i in range(2))
    assert focused() == first
    page.keyboard.press("ArrowDown")
    assert focused() == second
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # there is none
    assert focused() == first
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert dialog.is_visible() and focused() == first == dialog.locator("h2").text_content()
    (code,) = [code for code, name in data["codes"].items() if name == first]
    _, metrics, others, pairs, queries = data["details"][code]
    assert (others is None) == (runs == "one run")
    assert f"P@1 {100 * metrics[0]:.1f}%" in dialog.text_content()
    articles = dialog.locator("article")
    assert articles.count() == len(queries) == 2
    for i, (query, _, neighbors) in enumerate(queries):
        pictures = articles.nth(i).locator("img")
        assert [pictures.nth(j).get_attribute("src") for j in range(pictures.count())] == [
            data["pictures"][str(key)] for key in (query, *(neighbor[0] for neighbor in neighbors))
        ]
        told = pictures.nth(1).get_attribute("alt")
        assert pictures.nth(1).get_attribute("title") == told and told.endswith(data["files"][str(neighbors[0][0])])
        assert told.startswith("right: " if neighbors[0][2] else "wrong: ")
        caption = articles.nth(i).locator("figcaption").nth(1)
        assert caption.locator(".name").text_content() == data["codes"][str(data["shown"][str(neighbors[0][0])][1])]
        assert caption.locator(".file").text_content() == data["files"][str(neighbors[0][0])].split("/")[-1]
        assert f" {neighbors[0][1]:.2f}" in caption.text_content()
    page.keyboard.press("Tab")  # the first button behind the heading
    other = data["codes"][str(pairs[0][0])]
    assert focused() == other != first
    page.keyboard.press("Enter")
    assert dialog.locator("h2").text_content() == focused() == other
    page.keyboard.press("Escape")
    assert not dialog.is_visible() and focused() == first  # where it was opened
    page.locator("#pair-table .class-link").nth(1).click()
    assert dialog.locator("h2").text_content() == page.locator("#pair-table .class-link").nth(1).text_content()
    page.locator("#class-close").click()
    assert not dialog.is_visible()
    page.locator("#gallery .class-link").first.click()
    assert dialog.is_visible()
    assert page.evaluate("typeof hacked") == "undefined"


def test_browser_keeps_one_stop_for_each_table(opened):
    page = opened(runs="two runs")
    stops = page.locator("#class-table .class-link[tabindex='0']")
    page.locator("#class-filter").fill("class_3")
    assert stops.count() == 1 and stops.text_content().endswith("class_3")
    page.locator("#class-filter").fill("")
    page.locator("#change-table button").last.scroll_into_view_if_needed()
    page.locator("#change-table thead button").nth(3).click()  # the largest gain first
    shown = [float(x.replace("\u2212", "-")) for x in column(page, 3, "change-table")]
    assert shown == sorted(shown, reverse=True) and shown[0] > 0
    for table in ("class-table", "pair-table", "change-table"):
        links = page.locator(f"#{table} .class-link")
        assert links.count() >= 14 and links.first.get_attribute("tabindex") == "0"
        assert page.locator(f"#{table} .class-link:not([tabindex='-1'])").count() == 1


def test_browser_map(opened):
    page = opened()
    data = json.loads(page.locator("#data").text_content())
    points, tip = page.locator("#map-svg path"), page.locator("#map-tip")
    assert points.count() == 100 and not tip.is_visible()

    def expect(index):
        group, image = data["points"][index]
        picture = data["pictures"][str(image)]
        assert tip.is_visible()
        assert tip.locator("b").text_content() == data["names"][group]
        assert tip.locator("small").text_content() == f"image {image}, {data['files'][str(image)]}"
        assert tip.locator("img").get_attribute("src") == picture
        assert points.nth(index).get_attribute("aria-label") == (
            f"{data['names'][group]}, image {image}, {data['files'][str(image)]}"
        )

    def focused():
        return page.evaluate("[...document.querySelectorAll('#map-svg path')].indexOf(document.activeElement)")

    points.nth(42).scroll_into_view_if_needed()
    points.nth(42).hover(force=True)
    expect(42)
    page.mouse.move(5, 5)
    assert not tip.is_visible()
    page.locator("#map-class").focus()
    page.keyboard.press("Tab")
    assert focused() == 0
    expect(0)
    places = [tuple(map(float, p)) for p in re.findall(r"translate:\s*([\d.]+)px ([\d.]+)px", page.content())]
    moved = 0
    for key, axis, sign in (("Right", 0, 1), ("Down", 1, 1), ("Left", 0, -1), ("Up", 1, -1)):
        before = places[focused()]
        page.keyboard.press(f"Arrow{key}")
        expect(focused())
        assert sign * (places[focused()][axis] - before[axis]) >= 0
        moved += places[focused()] != before
    assert moved >= 2  # where there is a point in that direction
    seen = set()
    for _ in range(100):
        page.keyboard.press("PageDown")
        seen.add(focused())
    assert seen == set(range(100))
    assert page.locator("#map-svg path[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.locator("#map-class").select_option(label=EVIL[0])
    group = data["names"].index(EVIL[0])
    assert page.locator("#map-svg path.chosen").count() == sum(point[0] == group for point in data["points"]) > 0
    page.locator("#map-class").focus()
    page.keyboard.press("Tab")
    assert data["points"][focused()][0] == group
    page.keyboard.press("Shift+Tab")
    page.locator("#map-class").select_option("")
    assert page.locator("#map-svg path.chosen").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_browser_widths_and_contrast(opened, width, scheme, runs):
    page = opened(width, scheme, runs=runs)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("typeof hacked") == "undefined"
    assert faint_texts(page) == []
    page.locator("#class-table .class-link").first.click()
    dialog = page.locator("dialog")
    assert dialog.evaluate("x => x.scrollWidth <= x.clientWidth") and dialog.bounding_box()["width"] <= width
    assert faint_texts(page) == []


def faint_texts(page):
    """What has less contrast than 4.5."""
    return page.evaluate(
        """() => {
        const luminance = (rgb) => {
          const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map((x) => x / 255)
            .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const background = (element) => {
          for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (!/, 0\\)$/.test(color)) return color;
          }
        };
        const faint = [];
        for (const element of document.querySelectorAll("body *")) {
          const hasText = [...element.childNodes].some((x) => x.nodeType === 3 && x.data.trim());
          if (!hasText || !element.checkVisibility()) continue;
          const style = getComputedStyle(element);
          const ink = element instanceof SVGElement ? style.fill : style.color;
          let [a, b] = [luminance(ink), luminance(background(element))];
          if (a < b) [a, b] = [b, a];
          if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(element.outerHTML.slice(0, 80));
        }
        return faint;
        }"""
    )


def test_browser_without_scripts(opened):
    page = opened(js=False)
    assert page.locator("#map-svg path").first.is_visible()
    assert not page.locator("#class-filter").is_visible() and not page.locator("#map-class").is_visible()
    assert page.locator("#class-table tbody tr").count() > 5
    assert page.locator(".class-link").count() == 0 and not page.locator("dialog").is_visible()
