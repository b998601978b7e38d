"""The style sheet of report pages: light, dark, narrow, wide and printed."""

_LIGHT = """--ground:#fff;--panel:#f6f7f9;--ink:#1b1f24;--soft:#57606a;--rule:#d4d9df;--good:#12703a;--good-ground:#e3f5ea;
--bad:#a4161a;--bad-ground:#fdeaea;--open:#7a5200;--open-ground:#fdf3da;--c1:#1f5fbf;--c2:#c2570c;--c3:#14795a;--c4:#8a3fa0;color-scheme:light;"""
_DARK = """--ground:#14171b;--panel:#1d2228;--ink:#e8ebef;--soft:#a3adb8;--rule:#3a424c;--good:#6fd99a;--good-ground:#123322;
--bad:#ff9a94;--bad-ground:#431b1c;--open:#f3c969;--open-ground:#3a2e12;--c1:#7db2ff;--c2:#ffa45c;--c3:#5fd3a8;--c4:#d59be6;color-scheme:dark;"""

CSS = (
    f":root{{{_LIGHT}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    f"@media print{{:root{{{_LIGHT}}}}}\n"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1360px;margin:0 auto;padding:20px clamp(12px,3vw,40px) 48px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.2rem;margin:40px 0 8px;padding-bottom:4px;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 6px}
p{margin:6px 0;max-width:90ch}
.soft{color:var(--soft)}
.verdict{border-radius:8px;border-left:8px solid;padding:14px 18px;margin:18px 0;font-size:1.1rem;overflow-wrap:anywhere}
.verdict strong{display:block;font-size:1.35rem}
.verdict p{max-width:none}
.passed{background:var(--good-ground);border-color:var(--good)}
.failed{background:var(--bad-ground);border-color:var(--bad)}
.inconclusive{background:var(--open-ground);border-color:var(--open)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,200px),1fr));gap:12px;margin-top:16px}
.card{background:var(--panel);border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;align-items:start}
figure{margin:0;background:var(--panel);border-radius:8px;padding:12px 14px;break-inside:avoid;min-width:0}
figcaption{color:var(--soft);font-size:.88rem;margin-top:4px}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg .tick,svg .axis{fill:var(--soft)}
svg .grid{stroke:var(--rule);stroke-width:.7}
svg .frame{stroke:var(--soft);fill:none}
svg .line{fill:none;stroke-width:1.5;stroke-linejoin:round}
svg .limit{stroke:var(--bad);stroke-dasharray:5 3;stroke-width:1.2}
svg .limit-name{fill:var(--bad);paint-order:stroke;stroke:var(--panel);stroke-width:3px}
svg .mark{stroke:var(--soft);stroke-dasharray:2 3}
svg .yes{fill:var(--c3)}svg .no{fill:var(--bad)}
"""
    + "".join(
        f"svg .line.c{n}{{stroke:var(--c{n});stroke-dasharray:{dashes}}}svg .line.whisker{{stroke-dasharray:none}}"
        f"svg .dot.c{n},svg .key.c{n}{{fill:var(--c{n})}}svg .bar.c{n}{{stroke:var(--c{n});fill:var(--c{n});fill-opacity:{full}}}\n"
        for n, dashes, full in ((1, "none", 1), (2, "8 4", 0.15), (3, "2 2", 0.6), (4, "9 3 2 3", 0.35))
    )
    + """
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;color:var(--soft);padding:4px 0}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600;color:var(--soft)}
thead th{overflow-wrap:normal}
th[scope=row]{color:var(--ink)}
.scroll th[scope=row]{min-width:11em}
.facts th[scope=row]{width:13em;overflow-wrap:normal}
code{font-size:.92em}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.group th{color:var(--ink);padding-top:14px}
.tag{display:inline-block;border-radius:4px;padding:0 7px;font-size:.85rem;font-weight:600;white-space:nowrap}
.tag.passed{color:var(--good)}.tag.failed{color:var(--bad)}.tag.inconclusive{color:var(--open)}
.pair{table-layout:fixed}
ul{margin:6px 0;padding-left:20px}
@media (max-width:640px){
 svg .tick,svg .axis,svg .limit-name{font-size:13px}svg .legend{font-size:12px}
 .stack thead{display:none}
 .stack tr{display:block;padding:8px 0;border-bottom:1px solid var(--rule)}
 .stack tr.group{padding-bottom:0;border:0}
 .stack td,.stack th[scope=row]{display:block;width:auto;border:0;padding:1px 0;text-align:left;white-space:normal}
 .stack td.n{display:inline-block;margin-right:14px}
 .stack td[data-name]::before{content:attr(data-name) ": ";color:var(--soft)}
}
@media print{
 body{font-size:11pt}
 main{max-width:none;padding:0}
 h2{break-after:avoid}
 tr,.verdict,.card{break-inside:avoid}
 .verdict,.card,figure,svg{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 .scroll{overflow:visible}
}
"""
)
