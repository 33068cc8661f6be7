"""One page of a run: a file that needs no network, with every picture inside."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nadaptor._checks import extra
from nadaptor._files import write_bytes
from nadaptor.reports.pictures import svg_bytes

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #555; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
/* On a narrow window a table scrolls, and its rows keep their names in sight. */
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: #fff; max-width: 45vw; white-space: normal; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="table"><table>
<tr>{% for name in table.rows[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row.values() %}<td>{{ cell | breakable }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>Pictures</h2>
<div class="pictures">
{% for picture in pictures %}
<figure><img alt="{{ picture.caption }}" src="data:image/svg+xml;base64,{{ picture.data }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
</div>
</body>
</html>
"""


class Table(NamedTuple):
    """Rows of equal columns, with a title."""

    title: str
    rows: Sequence[Mapping[str, str]]


def html_page(
    title: str, summary: str, tables: Sequence[Table], pictures: Mapping[str, Any]
) -> str:
    """Returns a page with tables and pictures, usable on a narrow window and without a network.

    Args:
        title: of the page.
        summary: a sentence or two.
        tables: at least one row each.
        pictures: figures of matplotlib by their captions.

    Raises:
        MissingPackageError: Jinja2 is not installed.
    """
    with extra("train", "nadaptor.reports.html"):
        import jinja2
        import markupsafe

    shown = [
        {"caption": caption, "data": base64.b64encode(svg_bytes(figure)).decode()}
        for caption, figure in pictures.items()
    ]
    # A word that the template has and the page has not raises, and does not vanish.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    # Names of layers may break behind a slash, and nowhere else.
    environment.filters["breakable"] = lambda text: markupsafe.Markup("/<wbr>").join(
        text.split("/")
    )
    template = environment.from_string(_PAGE)
    return template.render(title=title, summary=summary, tables=tables, pictures=shown)


def write_page(path: Path, page: str) -> None:
    """Writes a page."""
    write_bytes(path, page.encode())
