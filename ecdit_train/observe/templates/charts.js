// Charts drawn from the page's columns: zoom, scale, horizontal axis, smoothing, read-out by pointer and by keys.
const HEIGHT = 280, LEFT = 62, RIGHT = 20, TOP = 12, BOTTOM = 34, NS = 'http://www.w3.org/2000/svg';
const charts = { all: new Map(), columns: null, axis: 'step', weight: null, views: new Map() };
const svg = (tag, set) => {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(set)) made.setAttribute(name, value);
  return made;
};
// Weight of the moving average; null: over a thirtieth of each curve.
const smoothed = (ys, weight) => {
  let mean = 0, norm = 0;
  return ys.map(y => {
    if (y === null) return null;
    mean = weight * mean + (1 - weight) * y; norm = weight * norm + 1 - weight;
    return mean / norm;
  });
};
const ticksOf = (low, high, about) => {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw * 0.999), ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
};
const logTicks = (low, high) => {
  const ticks = [], factors = high - low < 2.5 ? [1, 2, 5] : [1];
  for (let p = Math.floor(low); p <= Math.ceil(high); p++) {
    for (const f of factors) if (Math.log10(f) + p >= low && Math.log10(f) + p <= high) ticks.push(10 ** p * f);
  }
  return ticks.length > 1 ? ticks : ticksOf(10 ** low, 10 ** high, 4).filter(t => t > 0);
};

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.about = JSON.parse(figure.querySelector(':scope > script').textContent);
    this.plot = figure.querySelector('.plot');
    this.svg = this.plot.querySelector('svg');
    this.out = figure.querySelector('.legend output');
    this.keys = [...figure.querySelectorAll('.legend button')];
    // What the reader chose outlives an update of the page.
    this.view = charts.views.get(figure.id) || { from: null, to: null, log: this.about.log, hidden: new Set(), at: null };
    charts.views.set(figure.id, this.view);
    this.plot.tabIndex = 0;
    this.plot.setAttribute('role', 'application');
    this.plot.setAttribute('aria-label', figure.dataset.title
      + ': arrows read values, plus and minus zoom, 0 shows the whole curve, L changes the scale');
    this.log = figure.querySelector('[data-do=log]');
    this.reset = figure.querySelector('[data-do=reset]');
    this.log.addEventListener('click', () => { this.view.log = !this.view.log; this.draw(); });
    this.reset.addEventListener('click', () => { this.zoom(null, null); this.plot.focus(); });
    this.keys.forEach((button, n) => button.addEventListener('click', () => {
      const key = this.about.curves[n].key, { hidden } = this.view;
      if (hidden.has(key)) hidden.delete(key); else hidden.add(key);
      this.draw();
    }));
    this.listen();
    new ResizeObserver(() => { if (this.plot.clientWidth && this.plot.clientWidth !== this.width) this.draw(); }).observe(this.plot);
    this.draw();
  }

  // Values of every curve over the chosen axis: x, raw y and y as drawn, in the order of rows.
  curves() {
    const { columns, axis } = charts, xs = columns[axis] || columns.step;
    return this.about.curves.map(curve => {
      const series = columns.series[curve.key];
      if (!series) return { ...curve, x: [], y: [], raw: null };
      const x = series.at ? series.at.map(n => xs[n]) : xs, weight = charts.weight ?? Math.min(0.98, Math.max(0, 1 - 30 / x.length));
      const own = curve.smooth && weight > 0;
      return { ...curve, x, raw: own ? series.y : null, y: own ? smoothed(series.y, weight) : series.y };
    });
  }

  zoom(from, to) {
    const [low, high] = this.whole;
    if (from !== null) {
      from = Math.max(low, from); to = Math.min(high, to);
      if (!(to - from > (high - low) / 1e4)) return;
      if (from <= low && to >= high) from = to = null;
    }
    Object.assign(this.view, { from, to });
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth || (this.about.wide ? 1320 : 640), view = this.view;
    this.width = width;
    const drawn = this.curves(), shown = drawn.filter(c => !view.hidden.has(c.key));
    const right = width - RIGHT, bottom = HEIGHT - BOTTOM;
    let low = Infinity, high = -Infinity;
    for (const c of drawn) if (c.x.length) { low = Math.min(low, c.x[0]); high = Math.max(high, c.x[c.x.length - 1]); }
    if (!(low <= high)) { low = 0; high = 1; }
    if (low === high) { low -= 0.5; high += 0.5; }
    this.whole = [low, high];
    const a = view.from === null ? low : Math.max(low, view.from), b = view.to === null ? high : Math.min(high, view.to);
    const [from, to] = b > a ? [a, b] : [low, high], log = view.log, value = log ? Math.log10 : y => y;
    let least = Infinity, most = -Infinity;
    const faint = shown.length <= 4;
    for (const c of shown) for (const ys of faint && c.raw ? [c.y, c.raw] : [c.y]) ys.forEach((y, n) => {
      if (y === null || c.x[n] < from || c.x[n] > to || (log && y <= 0)) return;
      least = Math.min(least, value(y)); most = Math.max(most, value(y));
    });
    if (!(least <= most)) { least = 0; most = 1; }
    const pad = most > least ? (most - least) * 0.06 : Math.abs(least) * 0.1 || 0.5;
    least -= pad; most += pad;
    const px = x => LEFT + (x - from) / (to - from) * (right - LEFT), py = y => bottom - (value(y) - least) / (most - least) * (bottom - TOP);
    this.scale = { from, to, right, bottom, px };
    const parts = [];
    const text = (x, y, anchor, words) => { const t = svg('text', { x, y, 'text-anchor': anchor }); t.textContent = words; parts.push(t); };
    for (const y of log ? logTicks(least, most) : ticksOf(least, most, 5)) {
      const at = py(y).toFixed(1);
      parts.push(svg('line', { class: 'grid', x1: LEFT, x2: right, y1: at, y2: at }));
      text(LEFT - 8, +at + 4, 'end', page.short(y));
    }
    for (const x of ticksOf(from, to, Math.max(2, Math.round(width / 125)))) text(px(x).toFixed(1), bottom + 18, 'middle', page.short(x));
    text(LEFT - 8, bottom + 18, 'end', { step: 'step', images: 'images', time: 'hours' }[charts.axis]);
    parts.push(svg('line', { class: 'axis', x1: LEFT, x2: right, y1: bottom, y2: bottom }));
    const room = { x: LEFT - 2, y: 0, width: Math.max(1, right - LEFT + 4), height: bottom + 2 };
    const inside = svg('svg', { ...room, viewBox: Object.values(room).join(' '), class: 'lines' });
    parts.push(inside);
    const line = (xs, ys, color, kind) => {
      let path = '', pen = false;
      for (let n = 0; n < xs.length; n++) {
        // One point beyond each edge, so that lines run out of the picture.
        const outside = (xs[n] < from && xs[n + 1] < from) || (xs[n] > to && xs[n - 1] > to);
        if (ys[n] === null || outside || (log && ys[n] <= 0)) { pen = false; continue; }
        // A round end is all that a point between gaps has.
        path += (pen ? 'L' : 'M') + px(xs[n]).toFixed(1) + ',' + py(ys[n]).toFixed(1) + (pen ? '' : 'h.01');
        pen = true;
      }
      if (path) inside.append(svg('path', { d: path, stroke: color, class: kind }));
    };
    if (faint) for (const c of shown) if (c.raw) line(c.x, c.raw, c.color, 'faint');
    for (const c of shown) line(c.x, c.y, c.color, 'curve');
    this.drag = svg('rect', { class: 'picked', y: TOP, height: bottom - TOP, visibility: 'hidden' });
    this.cursor = svg('line', { class: 'cursor', y1: TOP, y2: bottom, visibility: 'hidden' });
    this.svg.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...parts, this.drag, this.cursor);
    this.drawn = drawn;
    const scale = this.figure.querySelector('.scale'), unit = scale.previousSibling;
    scale.textContent = !log ? '' : unit ? ', log scale' : 'log scale';
    this.log.setAttribute('aria-pressed', String(log));
    this.reset.hidden = view.from === null;
    this.keys.forEach((button, n) => button.setAttribute('aria-pressed', String(!view.hidden.has(this.about.curves[n].key))));
    this.tell();
  }

  // Rows of the log within the window that some shown curve has.
  rows() {
    const { axis, columns } = charts, xs = columns[axis] || columns.step, { from, to } = this.scale, found = new Set();
    for (const c of this.about.curves) {
      const series = columns.series[c.key];
      if (series) (series.at || xs.map((_, n) => n)).forEach(n => { if (xs[n] >= from && xs[n] <= to) found.add(n); });
    }
    // Rows of several runs stand one run after the other.
    return [...found].sort((a, b) => xs[a] - xs[b] || a - b).filter((n, i, all) => !i || xs[n] !== xs[all[i - 1]]);
  }

  // The read-out: values at the row that the cursor is on.
  tell() {
    const { columns, axis } = charts, { at } = this.view, xs = columns[axis] || columns.step;
    const x = at === null ? NaN : xs[at];
    if (!(x >= this.scale.from && x <= this.scale.to)) {
      this.cursor.setAttribute('visibility', 'hidden');
      this.out.textContent = '';
      this.keys.forEach(k => { k.querySelector('b').textContent = ''; });
      return;
    }
    const px = this.scale.px(x).toFixed(1);
    this.cursor.setAttribute('x1', px); this.cursor.setAttribute('x2', px); this.cursor.setAttribute('visibility', 'visible');
    this.out.textContent = 'step ' + columns.step[at].toLocaleString('en')
      + (axis === 'time' ? `, ${page.short(x)} h` : axis === 'images' ? `, ${page.short(x)} images` : '');
    const said = [];
    this.drawn.forEach((c, n) => {
      const row = c.x.findLastIndex(v => v <= x);
      const y = row < 0 ? null : c.y[row], raw = row < 0 || !c.raw ? null : c.raw[row];
      this.keys[n].querySelector('b').textContent = row < 0 ? '' : y === null ? 'not finite'
        : page.short(y) + (raw !== null ? ` (${page.short(raw)})` : '');
      if (row >= 0 && !this.view.hidden.has(c.key)) said.push(`${c.label} ${page.short(y)}`);
    });
    this.out.append(page.make('span', { class: 'unseen' }, ': ' + said.join(', ')));
  }

  nearest(x) {
    const xs = charts.columns[charts.axis] || charts.columns.step;
    let best = null;
    for (const n of this.rows()) if (best === null || Math.abs(xs[n] - x) < Math.abs(xs[best] - x)) best = n;
    return best;
  }

  listen() {
    const place = event => {
      const box = this.svg.getBoundingClientRect(), { from, to, right } = this.scale;
      const px = (event.clientX - box.left) / box.width * this.width;
      return { px, x: from + (Math.min(right, Math.max(LEFT, px)) - LEFT) / (right - LEFT) * (to - from) };
    };
    const fingers = new Map();
    let start = null, apart = null;
    this.svg.addEventListener('pointerdown', event => {
      if (event.button) return;
      fingers.set(event.pointerId, place(event));
      this.svg.setPointerCapture(event.pointerId);
      start = fingers.size === 1 && event.pointerType !== 'touch' ? place(event) : null;
      apart = fingers.size === 2 ? { at: [...fingers.values()].map(f => f.px), ...this.scale } : null;
    });
    this.svg.addEventListener('pointermove', event => {
      const now = place(event);
      if (fingers.has(event.pointerId)) fingers.set(event.pointerId, now);
      if (apart && fingers.size === 2) {
        const unit = (apart.to - apart.from) / (apart.right - LEFT), [p, q] = apart.at, [r, s] = [...fingers.values()].map(f => f.px);
        if (Math.abs(r - s) < 8) return;
        const factor = (p - q) / (r - s), x = apart.from + ((p + q) / 2 - LEFT) * unit, span = (apart.to - apart.from) * Math.abs(factor);
        const share = ((r + s) / 2 - LEFT) / (apart.right - LEFT);
        this.zoom(x - share * span, x + (1 - share) * span);
        return;
      }
      if (start && Math.abs(now.px - start.px) > 4) {
        const [a, b] = [start.px, now.px].sort((m, n) => m - n);
        for (const [name, value] of Object.entries({ x: a, width: b - a, visibility: 'visible' })) this.drag.setAttribute(name, value);
      }
      this.view.at = this.nearest(now.x);
      this.tell();
    });
    const up = event => {
      const first = start, now = place(event);
      fingers.delete(event.pointerId);
      start = null;
      if (fingers.size < 2) apart = null;
      this.drag.setAttribute('visibility', 'hidden');
      if (first && event.type === 'pointerup' && Math.abs(now.px - first.px) > 6) {
        this.zoom(Math.min(first.x, now.x), Math.max(first.x, now.x));
      }
    };
    this.svg.addEventListener('pointerup', up);
    this.svg.addEventListener('pointercancel', up);
    this.svg.addEventListener('pointerleave', () => { if (document.activeElement !== this.plot) { this.view.at = null; this.tell(); } });
    this.svg.addEventListener('dblclick', () => this.zoom(null, null));
    // A pinch on a touchpad comes as a wheel with Ctrl; a plain wheel goes on scrolling the page.
    this.plot.addEventListener('wheel', event => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.around(place(event).x, Math.exp(Math.max(-60, Math.min(60, event.deltaY)) / 150));
    }, { passive: false });
    this.plot.addEventListener('blur', () => { this.view.at = null; this.tell(); });
    this.plot.addEventListener('keydown', event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const rows = this.rows(), now = rows.indexOf(this.view.at), last = rows.length - 1;
      const to = { ArrowRight: now < 0 ? 0 : now + 1, ArrowLeft: now < 0 ? last : now - 1, PageDown: now + 20, PageUp: now - 20,
        Home: 0, End: last }[event.key];
      const { from, to: end } = this.scale, xs = charts.columns[charts.axis] || charts.columns.step;
      const middle = this.view.at === null ? (from + end) / 2 : xs[this.view.at];
      if (to !== undefined) { this.view.at = rows[Math.max(0, Math.min(last, to))] ?? null; this.tell(); }
      else if (event.key === '+' || event.key === '=') this.around(middle, 0.5);
      else if (event.key === '-') this.around(middle, 2);
      else if (event.key === '0' || event.key === 'Escape') this.zoom(null, null);
      else if (event.key.toLowerCase() === 'l') this.log.click();
      else return;
      event.preventDefault();
    });
  }

  around(x, factor) {
    const { from, to } = this.scale;
    this.zoom(x - (x - from) * factor, x + (to - x) * factor);
  }
}

charts.start = root => {
  root.querySelectorAll('.chart[id]').forEach(figure => charts.all.set(figure.id, new Chart(figure)));
};
charts.draw = () => charts.all.forEach(chart => chart.draw());
charts.set = columns => {
  charts.columns = columns;
  const axis = document.getElementById('x-axis');
  axis.querySelector('[value=images]').hidden = !columns.images;
};
{
  const axis = document.getElementById('x-axis'), knob = document.getElementById('smoothing'), out = knob.nextElementSibling;
  charts.set(page.read('curves'));
  // Below 0: each curve's own weight.
  knob.value = -1;
  const say = () => {
    out.textContent = charts.weight === null ? 'auto' : charts.weight ? charts.weight.toFixed(2) : 'none';
    knob.setAttribute('aria-valuetext', out.textContent);
  };
  knob.addEventListener('input', () => { charts.weight = knob.value < 0 ? null : knob.value / 100; say(); charts.draw(); });
  axis.addEventListener('change', () => {
    charts.axis = axis.value;
    charts.all.forEach(chart => Object.assign(chart.view, { from: null, to: null }));
    charts.draw();
  });
  say();
  charts.start(document);
}
