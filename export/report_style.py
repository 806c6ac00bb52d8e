"""The looks of `report.html`: light, dark, on a phone and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1d1c1a; --soft: #6b675f;
  --line: #e4e0d8; --track: #efece5; --mark: #0b6e64; --mark-2: #7fb3ac;
  --base: #b9b3a7; --warn: #a8461f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131516; --card: #1b1e20; --ink: #e9e6df; --soft: #9a968d;
    --line: #2d3133; --track: #262a2c; --mark: #4fc3b3; --mark-2: #2f7d74;
    --base: #5d5a54; --warn: #f0956b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 880px; margin: 0 auto; padding: 56px 24px 72px; }
h1 {
  font: 600 clamp(28px, 6vw, 42px)/1.1 ui-serif, Georgia, serif;
  letter-spacing: -.015em; margin: 0 0 10px; overflow-wrap: anywhere;
}
h2 {
  font: 600 21px/1.25 ui-serif, Georgia, serif;
  margin: 52px 0 6px; padding-top: 18px; border-top: 1px solid var(--line);
}
p { margin: 0 0 12px; max-width: 66ch; }
.lead { color: var(--soft); }
.soft, small { color: var(--soft); font-size: 14px; }
code, .mono {
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere;
}
.figures {
  display: grid; gap: 1px; margin: 30px 0 0; overflow: hidden;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  background: var(--line); border: 1px solid var(--line); border-radius: 10px;
}
.figures > div { background: var(--card); padding: 16px 18px 14px; }
.figures dt { color: var(--soft); font-size: 13px; }
.figures dd { margin: 2px 0 0; font-size: 25px; font-weight: 600; }
.figures dd small { display: block; font-weight: 400; font-size: 13px; }
.bars { margin: 20px 0 4px; }
.bars h3 { font-size: 14px; font-weight: 600; margin: 18px 0 6px; }
.bar {
  display: grid; align-items: center; gap: 12px; margin: 5px 0;
  grid-template-columns: 72px 1fr 92px; font-size: 14px;
}
.bar > :last-child { text-align: right; }
.track { background: var(--track); border-radius: 3px; height: 14px; }
.track i {
  display: block; height: 100%; min-width: 2px; border-radius: 3px;
  background: var(--mark-2);
}
.bar.keras i { background: var(--base); }
.bar.final i { background: var(--mark); }
.bar.final { font-weight: 600; }
.scroll { overflow-x: auto; margin: 14px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th {
  text-align: left; font-weight: 500; color: var(--soft); font-size: 13px;
  padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line);
}
td {
  padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; }
.changed { color: var(--warn); font-weight: 600; }
.chart {
  display: grid; grid-template-columns: auto 1fr; gap: 0 10px;
  margin: 18px 0 4px; font-size: 12px; color: var(--soft);
}
.chart svg {
  display: block; width: 100%; height: 170px; overflow: visible;
  border-bottom: 1px solid var(--base);
}
.chart rect { fill: var(--mark); }
.chart rect:hover { fill: var(--warn); }
.chart line { stroke: var(--line); vector-effect: non-scaling-stroke; }
.chart .y { display: flex; flex-direction: column; height: 170px;
  justify-content: space-between; text-align: right; }
.chart .y span { line-height: 0; }
.chart .x { grid-column: 2; display: flex; justify-content: space-between;
  padding-top: 6px; gap: 12px; }
ul { padding-left: 20px; margin: 8px 0; }
li { margin: 6px 0; max-width: 68ch; overflow-wrap: anywhere; }
footer { margin-top: 56px; color: var(--soft); font-size: 13px; }
@media (max-width: 560px) {
  main { padding: 32px 18px 48px; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures > div { padding: 12px 14px; }
  .figures dd { font-size: 21px; }
  .bar { grid-template-columns: 58px 1fr 76px; gap: 8px; }
  .stack thead { display: none; }
  .stack tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr));
    column-gap: 24px; padding: 10px 0;
    border-bottom: 1px solid var(--line); }
  .stack td { display: flex; justify-content: space-between; gap: 16px;
    border: 0; padding: 2px 0; text-align: right; }
  .stack td::before { content: attr(data-name); color: var(--soft);
    flex: none; text-align: left; }
  .stack td:empty { display: none; }
  .stack td.wide { display: block; grid-column: 1 / -1; text-align: left;
    padding-bottom: 4px; }
  .stack td.wide::before { content: none; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444;
    --line: #ccc; --track: #eee; --mark: #0b6e64; --mark-2: #7fb3ac;
    --base: #999; --warn: #a8461f; color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 32px; }
  .figures, .bars, .chart, tr, li { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
