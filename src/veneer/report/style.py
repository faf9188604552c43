"""The report's style sheet: the system's typeface, two colours, light and dark, phone to
desktop.
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1d21; --soft: #666a73; --rule: #e4e5e9;
  --tint: #f6f6f8; --a: #2456d6; --b: #c2580a; --quiet: #b9c3da; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161a; --ink: #ececf0; --soft: #9a9ea9;
  --rule: #2c2e35; --tint: #1d1f24; --a: #7aa2ff; --b: #f0a052; --quiet: #46506a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", Roboto, "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 800px; margin: 0 auto; padding: 56px 20px 96px; }
header { margin-bottom: 40px; }
h1 { margin: 0 0 4px; font-size: 40px; line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
header .status { margin-top: 12px; color: var(--ink); }
h2 { margin: 0 0 16px; font-size: 20px; line-height: 1.3; }
section { margin-top: 56px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr));
  gap: 28px 20px; }
.figures div { display: flex; flex-direction: column; }
.figures b { font-size: 28px; font-weight: 600; line-height: 1.2; letter-spacing: -.01em; }
.figures span { font-size: 14px; }
.figures small { font-size: 14px; color: var(--soft); }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-bottom: 8px; font-size: 14px;
  color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; border-radius: 2px;
  margin-right: 8px; vertical-align: middle; background: var(--quiet); }
.key.a::before { background: var(--a); } .key.b::before { background: var(--b); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); }
svg.narrow { display: none; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.quiet { stroke: var(--quiet); stroke-width: 1; } .line.a { stroke: var(--a); }
.line.b { stroke: var(--b); }
.pale.line, .pale.key::before { opacity: .4; } circle.pale { fill-opacity: .4; }
circle { stroke: var(--paper); stroke-width: 1.5; fill: var(--quiet); }
circle.a { fill: var(--a); } circle.b { fill: var(--b); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 32px; }
article { padding: 20px 0; border-top: 1px solid var(--rule); }
article:last-child { border-bottom: 1px solid var(--rule); }
h3 { margin: 0 0 12px; font-size: 16px; font-weight: 600; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 9em; overflow-y: auto; }
h4 { margin: 0; font-size: 14px; font-weight: 400; color: var(--soft); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr));
  gap: 16px 24px; }
.answers p { margin: 2px 0 0; font-size: 15px; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 20em; overflow-y: auto; }
.bars { margin: 0; }
.bars div { display: grid; grid-template-columns: 210px 1fr; align-items: center; padding: 5px 0; }
.bars dd { display: flex; align-items: center; gap: 10px; margin: 0; white-space: nowrap; }
.bars i { height: 14px; border-radius: 3px; min-width: 2px; background: var(--quiet); }
.bars i.a { background: var(--a); } .bars i.b { background: var(--b); }
.spans dd { flex-wrap: wrap; } .track { position: relative; flex: 1 1 200px; height: 18px; }
.track i, .track u, .track b { position: absolute; } .track i { top: 2px; min-width: 1px; }
.track b { top: 0; bottom: 0; border-left: 1px solid var(--soft); }
.track u { top: 8px; border-top: 2px solid var(--ink); opacity: .55; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
td, th { padding: 7px 20px 7px 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 400; color: var(--soft); font-size: 14px; white-space: nowrap; }
td:first-child { width: 35%; color: var(--soft); }
td:nth-child(3) { color: var(--soft); }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--soft); font-size: 15px; padding: 4px 0; }
pre { margin: 8px 0 0; padding: 14px 16px; background: var(--tint); border-radius: 8px;
  font-size: 14px;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 640px) { main { padding-top: 32px; } h1 { font-size: 30px; }
  .figures { grid-template-columns: 1fr 1fr; } .figures b { font-size: 24px; }
  .pair, .answers { grid-template-columns: 1fr; } .bars div { grid-template-columns: 1fr; }
  svg.wide { display: none; } svg.narrow { display: block; } section { margin-top: 44px; } }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
