"""The look of the report: one style sheet and one script, both inline, so that the page is a single file."""

STYLE = """
:root { --ink:#111827; --soft:#4b5563; --faint:#9ca3af; --line:#e5e7eb; --paper:#fff; --ground:#f6f7f9;
  --accent:#2563eb; }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif; }
main { max-width:1180px; margin:0 auto; padding:32px 20px 64px; }
h1 { font-size:1.9rem; line-height:1.2; margin:0 0 4px; letter-spacing:-.02em; overflow-wrap:anywhere; }
h2 { font-size:1.2rem; margin:0 0 4px; letter-spacing:-.01em; }
h3 { font-size:1rem; margin:24px 0 8px; }
p.lead, p.note { color:var(--soft); margin:0 0 16px; max-width:78ch; }
p.note { font-size:.9rem; }
section { background:var(--paper); border:1px solid var(--line); border-radius:14px; padding:22px 24px;
  margin-top:22px; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(132px,1fr)); gap:12px; margin-top:20px; }
.tile { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:12px 16px; line-height:1.3; }
.tile b { display:block; font-size:1.3rem; font-weight:650; letter-spacing:-.02em; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:.8rem; }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr)); gap:22px; }
.wide { grid-column:1/-1; }
figure { margin:0; }
.chart svg { width:100%; height:auto; display:block; touch-action:pan-y; }
.chart svg text { font-size:12px; fill:var(--soft); font-variant-numeric:tabular-nums; }
.chart polyline { fill:none; stroke-linejoin:round; stroke-linecap:round; }
.chart .grid { stroke:var(--line); } .chart .axis { stroke:#cbd5e1; }
.chart .cursor { stroke:var(--faint); stroke-dasharray:3 3; }
.chart figcaption small, .legend { color:var(--soft); font-size:.82rem; }
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; min-height:1.6em; font-variant-numeric:tabular-nums; }
.legend i { display:inline-block; width:12px; height:3px; border-radius:2px; margin-right:6px; vertical-align:middle; }
.legend b { font-weight:600; margin-left:6px; color:var(--ink); } .legend em { font-style:normal; color:var(--ink); }
.legend em:empty { display:none; }
img { max-width:100%; height:auto; display:block; border-radius:6px; }
.slides img { margin:0 auto; }
.slides figcaption { color:var(--soft); font-size:.88rem; margin:10px 0 0; text-align:center; }
.slider { display:flex; gap:14px; align-items:center; margin:4px 0 14px; }
.slider[hidden] { display:none; }
.slider input { flex:1; min-width:0; accent-color:var(--accent); }
.slider output { font-variant-numeric:tabular-nums; min-width:7em; }
.slider button { border:1px solid var(--line); background:var(--paper); border-radius:8px; padding:4px 12px;
  font:inherit; cursor:pointer; }
.slide { margin-bottom:20px; } .slides.live .slide { display:none; margin-bottom:0; }
.slides.live .slide.on { display:block; }
.small { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr)); gap:16px; }
.small figcaption { color:var(--soft); font-size:.82rem; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:.92rem; }
th, td { text-align:left; padding:7px 14px 7px 0; border-bottom:1px solid var(--line); vertical-align:top; }
th { font-weight:600; color:var(--soft); font-size:.82rem; }
td span { font-variant-numeric:tabular-nums; white-space:nowrap; } td small { color:var(--soft); font-size:1em; }
code, pre { font-family:ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace; font-size:.86em; }
pre { overflow-x:auto; background:var(--ground); padding:14px 16px; border-radius:10px; line-height:1.45; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 18px; margin:0 0 10px; }
dt { color:var(--soft); } dd { margin:0; overflow-wrap:anywhere; }
summary { cursor:pointer; color:var(--accent); }
@media (max-width:560px) {
  main { padding:20px 12px 40px; } section { padding:16px; } dl { grid-template-columns:1fr; gap:0; }
  dd { margin-bottom:8px; } .wide { overflow-x:auto; } .chart.wide svg { width:820px; }
}
@media print { section { break-inside:avoid; } .slider { display:none; } }
"""

SCRIPT = """
document.querySelectorAll('.chart').forEach(chart => {
  const svg = chart.querySelector('svg'), cursor = svg.querySelector('.cursor');
  const data = JSON.parse(chart.querySelector('script').textContent);
  const cells = chart.querySelectorAll('.legend b'), head = chart.querySelector('.legend em');
  const clear = () => {
    cursor.setAttribute('visibility', 'hidden');
    head.textContent = '';
    cells.forEach(c => c.textContent = '');
  };
  svg.addEventListener('pointerleave', clear);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * data.width;
    const [a, b] = data.span, [low, high] = data.x;
    if (at < a || at > b) return clear();
    const step = low + (at - a) / (b - a) * (high - low);
    cursor.setAttribute('x1', at); cursor.setAttribute('x2', at); cursor.setAttribute('visibility', 'visible');
    head.textContent = 'step ' + Math.round(step).toLocaleString('en');
    data.curves.forEach((curve, n) => {
      let best = 0;
      curve.x.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(curve.x[best] - step)) best = i; });
      cells[n].textContent = curve.y[best];
    });
  });
});
document.querySelectorAll('.slides').forEach(box => {
  const slides = [...box.querySelectorAll('.slide')], bar = box.querySelector('.slider');
  if (slides.length < 2) return;
  const range = bar.querySelector('input'), out = bar.querySelector('output'), play = bar.querySelector('button');
  let timer = null;
  const show = n => {
    slides.forEach((s, i) => s.classList.toggle('on', i === n));
    range.value = n;
    out.textContent = slides[n].dataset.label;
  };
  const stop = () => { clearInterval(timer); timer = null; if (play) play.textContent = 'Play'; };
  box.classList.add('live');
  bar.hidden = false;
  range.addEventListener('input', () => { stop(); show(+range.value); });
  if (play) play.addEventListener('click', () => {
    if (timer) return stop();
    play.textContent = 'Pause';
    if (+range.value === slides.length - 1) show(0);
    timer = setInterval(() => +range.value < slides.length - 1 ? show(+range.value + 1) : stop(), 700);
  });
  show(+box.dataset.start);
});
"""
