"""The page's style: no file beside it, light and dark, readable on paper."""

# Ramps of ten steps whose lightness alone tells them apart.
BLUES = ("#f3f7fb", "#dfeaf5", "#c8dcee", "#abcbe5", "#87b5da", "#6099ca", "#3877af", "#28629b", "#174a7c", "#0b335b")
BROWNS = ("#fdf6ec", "#f9e8ce", "#f3d6a9", "#e9bf80", "#dba55b", "#c6883d", "#a46725", "#89521b", "#693c13", "#4a290d")
# Okabe and Ito's colours; high precision has none.
CATEGORIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
BLACK, WHITE = "#111111", "#ffffff"


def luminance(color: str) -> float:
    """Relative, of "#rrggbb" (WCAG 2.2)."""
    parts = [int(color[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """From 1 to 21 (WCAG 2.2)."""
    low, high = sorted(luminance(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def text_on(color: str) -> str:
    """Black or white, whichever is easier to read there."""
    return max((BLACK, WHITE), key=lambda text: contrast(color, text))


def _classes(letter: str, colors: tuple[str, ...]) -> str:
    return "".join(f".{letter}{step}{{background:{color};color:{text_on(color)}}}" for step, color in enumerate(colors))


CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--card:#f6f8fa;--value:#0072b2;
--band:#0072b233;--clip:#c04a00}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ec;--soft:#9aa4af;--line:#353c44;--card:#1d2228;
--value:#56b4e9;--band:#56b4e944;--clip:#ff9a52}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.2em 0 .4em}
h3{font-size:.95rem;margin:1.2em 0 .3em}
p{margin:.4em 0;max-width:75ch}.soft{color:var(--soft)}code,pre{font-family:ui-monospace,monospace;font-size:.86em}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:12px;margin:20px 0 0;padding:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.card dt{color:var(--soft);font-size:.85rem}.card dd{margin:0;font-size:1.45rem;font-weight:600;line-height:1.3}
.card dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.86rem}
th,td{padding:3px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{border-bottom:2px solid var(--line)}td.n,th.n{text-align:right}
table.heat{border-spacing:0}
table.heat td,table.heat th{padding:1px 6px;border:1px solid var(--paper);text-align:center;white-space:nowrap}
table.heat thead th{vertical-align:bottom;font-weight:500}table.heat thead span{color:var(--soft);display:block;font-size:.78rem}
table.heat tbody th{font-weight:500;text-align:right;color:var(--soft)}
@media (max-width:640px){table.heat{font-size:.68rem}table.heat td,table.heat th{padding:1px 2px}
table.heat thead span{font-size:.62rem}}
table.heat td.gap,table.heat th.gap{background:none;border:0;padding:0 4px}table.heat td.none{color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center;margin:8px 0;font-size:.85rem}
.legend span.key{display:inline-block;padding:0 8px;border-radius:3px;font-size:.8rem}
.ramp span{display:inline-block;width:22px;height:12px;vertical-align:middle}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:14px 18px}
.small{grid-template-columns:repeat(auto-fill,minmax(225px,1fr))}
figure{margin:0;min-width:0}figcaption{font-size:.84rem;margin-bottom:2px;overflow-wrap:anywhere}figcaption b{font-weight:600}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font:10px system-ui,sans-serif}
.bar{fill:var(--value)}.band{fill:var(--band)}.axis{stroke:var(--line);fill:none}
.clip{stroke:var(--clip);stroke-width:1.5;fill:none}
.clips{fill:var(--clip);opacity:.22}.middle{stroke:var(--value);fill:none;stroke-width:1.5}
.tail{stroke:var(--value);fill:none;stroke-dasharray:3 2}
.dot{fill:none;stroke:var(--value)}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;padding:0 12px}summary{cursor:pointer;padding:7px 0}
details[open]{padding-bottom:12px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;white-space:pre-wrap}
pre,td code{overflow-wrap:anywhere}
@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{font-size:10pt}main{max-width:none;padding:0}
figure,.card,tr{break-inside:avoid}h2,h3{break-after:avoid}
.wide{overflow:visible}table.heat{font-size:7pt}details:not([open]){display:none}}
""" + _classes("h", BLUES) + _classes("o", BROWNS) + _classes("c", CATEGORIES)
