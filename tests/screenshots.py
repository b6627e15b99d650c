"""Pictures of the page for the README: `python tests/screenshots.py [--model emoji]` -> assets/screenshots/*.png."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from browser import CHROMIUM, FLAGS, Pad, served  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from sana_app.engine import Engine  # noqa: E402
from sana_app.presets import find_model  # noqa: E402

VIEWS = {
    "desktop": dict(viewport={"width": 1440, "height": 1080}, color_scheme="light"),
    "dark": dict(viewport={"width": 1440, "height": 1080}, color_scheme="dark"),
    "phone": dict(viewport={"width": 390, "height": 844}, color_scheme="light", device_scale_factor=2, is_mobile=True, has_touch=True),
}
EXAMPLE = {"desktop": 0, "dark": 1, "phone": 2}  # a different drawing in each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    args = parser.parse_args()
    out = ROOT / "assets" / "screenshots"
    out.mkdir(parents=True, exist_ok=True)
    with served(Engine.load(find_model(args.model))) as (_, url), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, options in VIEWS.items():
            context = browser.new_context(reduced_motion="reduce", **options)
            pad = Pad(context.new_page(), url)
            if EXAMPLE[name]:
                pad.page.locator(".sp-example").nth(EXAMPLE[name]).click()
            else:  # the page opens with the first: the leaf's vein makes it one's own, and shows the times of a stroke
                pad.stroke(*((290 + 4 * i, 116 - 2 * i) for i in range(16)))
            pad.settle()
            pad.page.mouse.move(0, 0)
            pad.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            pad.page.screenshot(path=out / f"{name}.png", full_page=name == "phone")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
