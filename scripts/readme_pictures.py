"""Makes README's pictures of the quickstart: two charts of a run's report, as a browser shows them.

python scripts/readme_pictures.py runs/tiny     # of a finished run of configs/tiny.py; needs Chromium and pytest
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pages")]
from browser import Browser  # noqa: E402

from flax_switch.workflows.report import write_report  # noqa: E402

PICTURES = {  # name -> what of the report
    "quickstart_loss": '[document.querySelector("figure.wide")]',
    "quickstart_expert_load": "(({previousElementSibling, children}) => [...previousElementSibling.children, ...children])"
    '(document.querySelector(".maps"))',
}


def main() -> int:
    """Writes docs/images/*.png."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a finished run of configs/tiny.py")
    report = write_report(parser.parse_args().run)
    with Browser() as browser:
        browser.show(report, 900, scale=2)
        for name, elements in PICTURES.items():
            script = f"""(() => {{ const boxes = {elements}.map((element) => element.getBoundingClientRect());
                const x = Math.min(...boxes.map((box) => box.left)) - 8, y = Math.min(...boxes.map((box) => box.top)) - 8;
                const right = Math.max(...boxes.map((box) => box.right)), low = Math.max(...boxes.map((box) => box.bottom));
                return JSON.stringify({{x: x + scrollX, y: y + scrollY, width: right - x + 8,
                    height: low - y + 8, scale: 1}}); }})()"""
            browser.screenshot(ROOT / "docs" / "images" / f"{name}.png", json.loads(browser.value(script)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
