// The routing explorer: which expert took which patch, of every embedded picture, layer, timestep and training step.
const HEAT = [[255, 255, 204], [255, 237, 160], [254, 217, 118], [254, 178, 76], [253, 141, 60], [252, 78, 42], [227, 26, 28],
  [189, 0, 38], [128, 0, 38]];
const heat = share => {
  const at = Math.max(0, Math.min(1, share)) * (HEAT.length - 1), n = Math.min(HEAT.length - 2, Math.floor(at));
  return HEAT[n].map((c, i) => Math.round(c + (HEAT[n + 1][i] - c) * (at - n)));
};
const plural = (n, one, many = one + 's') => `${n.toLocaleString('en')} ${n === 1 ? one : many}`;

const ONES = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll('0', '').length);

// Arrays of one training step; places are counted from 0 here and from 1 in words.
class Maps {
  constructor(entry) {
    Object.assign(this, entry);
    const bytes = text => text && Uint8Array.from(atob(text), c => c.charCodeAt(0));
    this.bits = bytes(entry.chosen);
    this.given = bytes(entry.counts);
    this.T = entry.timesteps.length; this.L = entry.layers.length; this.K = entry.side ** 2;
    this.width = Math.ceil(entry.experts / 8);
  }

  row(image, t, layer) { return ((image * this.T + t) * this.L + layer) * this.K; }

  // 1 where the expert took the patch.
  taken(image, t, layer, expert) {
    const first = this.row(image, t, layer);
    return Uint8Array.from({ length: this.K }, (_, k) => this.bits[(first + k) * this.width + (expert >> 3)] >> (expert & 7) & 1);
  }

  count(image, t, layer) {
    const first = this.row(image, t, layer), { bits, width } = this;
    if (this.given) return this.given.subarray(first, first + this.K);
    const counts = new Uint8Array(this.K);
    for (let k = 0, at = first * width; k < this.K; k++) for (let b = 0; b < width; b++, at++) counts[k] += ONES[bits[at]];
    return counts;
  }

  experts_of(image, t, layer, patch) {
    const at = (this.row(image, t, layer) + patch) * this.width, found = [];
    for (let e = 0; e < this.experts; e++) if (this.bits[at + (e >> 3)] >> (e & 7) & 1) found.push(e);
    return found;
  }

  // The largest count of a picture over layers and timesteps: one colour scale for all of it.
  most(image) {
    this.largest ||= [];
    if (!this.largest[image]) {
      let most = 1;
      for (let t = 0; t < this.T; t++) for (let l = 0; l < this.L; l++) for (const n of this.count(image, t, l)) most = Math.max(most, n);
      this.largest[image] = most;
    }
    return this.largest[image];
  }
}

const explorer = {
  state: { step: null, layer: null, time: null, prompt: null, expert: null, patch: null, opacity: 65 },

  start(data) {
    this.box = document.querySelector('.explorer');
    if (!this.box || !data) return;
    this.box.hidden = false;
    const find = what => this.box.querySelector(what);
    this.knobs = Object.fromEntries([...this.box.querySelectorAll('[data-set]')].map(k => [k.dataset.set, k]));
    this.map = find('.map'); this.canvas = find('.map canvas'); this.total = find('.total'); this.patchText = find('.patch');
    this.matrices = find('.matrices'); this.multiples = find('.multiples'); this.numbers = find('.numbers');
    this.knobs.opacity.value = this.state.opacity;
    for (const [name, knob] of Object.entries(this.knobs)) {
      knob.addEventListener('input', () => {
        const value = knob.value === '' ? null : +knob.value;
        if (name === 'step') this.state.step = value === this.maps.length - 1 ? null : this.maps[value].step;
        else this.state[name] = value;
        this.draw();
      });
    }
    this.numbers.addEventListener('toggle', () => this.draw());
    this.map.addEventListener('keydown', event => this.key(event));
    this.canvas.addEventListener('click', event => {
      const box = this.canvas.getBoundingClientRect(), side = this.now.maps.side;
      const of = (at, from, size) => Math.max(0, Math.min(side - 1, Math.floor((at - from) / size * side)));
      const patch = of(event.clientY, box.top, box.height) * side + of(event.clientX, box.left, box.width);
      this.state.patch = this.state.patch === patch ? null : patch;
      this.draw();
    });
    this.update(data);
  },

  // New maps; what was chosen stays chosen where it still exists.
  update(data) {
    if (!this.box) return;
    this.maps = data.steps.map(entry => (entry instanceof Maps ? entry : new Maps(entry)));
    this.pictures = new Map();
    this.made = this.grid = this.small_drawn = null;
    this.draw();
  },

  picture(source) {
    if (!this.pictures.has(source)) {
      const image = new Image();
      image.onload = () => this.draw();
      image.src = source;
      this.pictures.set(source, image);
    }
    return this.pictures.get(source);
  },

  draw() {
    const { state, knobs } = this;
    const n = state.step === null ? this.maps.length - 1 : Math.max(0, this.maps.findIndex(m => m.step === state.step));
    const maps = this.maps[n], within = (value, most, other) => value === null ? other : Math.min(value, most - 1);
    const image = Math.max(0, maps.prompts.indexOf(state.prompt));
    const t = within(state.time, maps.T, Math.floor(maps.T / 2)), layer = within(state.layer, maps.L, maps.L - 1);
    const expert = maps.bits && state.expert !== null && state.expert < maps.experts ? state.expert : null;
    const patch = state.patch !== null && state.patch < maps.K ? state.patch : null;
    this.now = { n, maps, image, t, layer, expert, patch };
    this.controls();
    const put = (name, value, most, words) => {
      const knob = knobs[name];
      knob.max = most; knob.value = value;
      knob.setAttribute('aria-valuetext', words);
      knob.closest('label').hidden = most < 1;
      knob.parentElement.querySelector('output').textContent = words;
    };
    put('step', n, this.maps.length - 1, maps.step.toLocaleString('en'));
    put('layer', layer, maps.L - 1, String(maps.layers[layer]));
    put('time', t, maps.T - 1, 't = ' + maps.timesteps[t].toFixed(2));
    put('opacity', state.opacity, 100, state.opacity + ' %');
    knobs.expert.value = expert === null ? '' : expert;
    knobs.expert.closest('label').hidden = !maps.bits;
    const counts = maps.count(image, t, layer), values = expert === null ? counts : maps.taken(image, t, layer, expert);
    const most = expert === null ? maps.most(image) : 1;
    this.big(values, most);
    this.scale(most, expert);
    this.say(counts, values);
    this.patchSays();
    this.small(most);
    this.asNumbers(values);
  },

  // Pictures to choose from, and the experts' names; made once for each file.
  controls() {
    const { maps, image } = this.now;
    if (this.made !== maps) {
      this.made = maps;
      const list = this.box.querySelector('.pictures');
      list.replaceChildren(...maps.prompts.map((prompt, b) => {
        const button = page.make('button', { type: 'button', role: 'radio' }, page.make('img', { src: maps.pictures[b], alt: '' }), prompt);
        button.addEventListener('click', () => { this.state.prompt = prompt; this.draw(); });
        button.addEventListener('keydown', event => {
          const go = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
          if (!go) return;
          event.preventDefault();
          const other = (b + go + maps.prompts.length) % maps.prompts.length;
          this.state.prompt = maps.prompts[other];
          this.draw();
          list.children[other].focus();
        });
        return button;
      }));
      const names = Array.from({ length: maps.experts }, (_, e) => page.make('option', { value: String(e) }, `expert ${e + 1}`));
      this.knobs.expert.replaceChildren(page.make('option', { value: '' }, 'all'), ...names);
    }
    [...this.box.querySelector('.pictures').children].forEach((button, b) => {
      button.setAttribute('aria-checked', String(b === image));
      button.tabIndex = b === image ? 0 : -1;
    });
  },

  // `frames`: where the picture looked otherwise at each timestep.
  paint(canvas, values, most, opacity, t = this.now.t) {
    const { maps, image } = this.now, context = canvas.getContext('2d');
    const picture = this.picture(maps.frames ? maps.frames[t] : maps.pictures[image]);
    const cell = canvas.width / maps.side;
    context.imageSmoothingEnabled = false;
    context.globalAlpha = 1;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (picture.complete && picture.naturalWidth) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    if (this.now.expert === null) {
      // Grey and pale below counts, so that a red or a dark shape does not pass for one.
      for (const [mode, alpha, color] of [['saturation', 1, '#808080'], ['source-over', 0.5, '#fff']]) {
        Object.assign(context, { globalCompositeOperation: mode, globalAlpha: alpha * Math.min(1, opacity / 40), fillStyle: color });
        context.fillRect(0, 0, canvas.width, canvas.height);
      }
    }
    context.globalAlpha = opacity / 100;
    values.forEach((value, k) => {
      context.fillStyle = most === 1 && this.now.expert !== null ? (value ? '#e31a1c' : '#fff') : `rgb(${heat(value / most)})`;
      const x = Math.round(k % maps.side * cell), y = Math.round(Math.floor(k / maps.side) * cell);
      context.fillRect(x, y, Math.round((k % maps.side + 1) * cell) - x, Math.round((Math.floor(k / maps.side) + 1) * cell) - y);
    });
    context.globalAlpha = 1;
  },

  big(values, most) {
    const { maps, patch } = this.now, cell = Math.max(8, Math.floor(512 / maps.side)), size = cell * maps.side;
    if (this.canvas.width !== size) this.canvas.width = this.canvas.height = size;
    this.paint(this.canvas, values, most, this.state.opacity);
    if (patch === null) return;
    const context = this.canvas.getContext('2d'), x = patch % maps.side * cell, y = Math.floor(patch / maps.side) * cell;
    for (const [color, width] of [['#fff', 5], ['#1d4ed8', 3]]) {
      Object.assign(context, { strokeStyle: color, lineWidth: width });
      context.strokeRect(x + 1.5, y + 1.5, cell - 3, cell - 3);
    }
  },

  scale(most, expert) {
    const bar = this.box.querySelector('.heat'), context = bar.querySelector('canvas').getContext('2d');
    bar.hidden = expert !== null;
    for (let x = 0; x < 200; x++) { context.fillStyle = `rgb(${heat(x / 199)})`; context.fillRect(x, 0, 1, 1); }
    bar.firstElementChild.textContent = '0';
    bar.lastElementChild.textContent = plural(most, 'expert') + ' a patch';
  },

  say(counts, values) {
    const { maps, image, t, layer, expert } = this.now, sum = counts.reduce((a, b) => a + b, 0), none = counts.filter(c => !c).length;
    const share = n => Math.round(100 * n / maps.K) + ' %';
    const where = `Layer ${maps.layers[layer]}, t = ${maps.timesteps[t].toFixed(2)}, step ${maps.step.toLocaleString('en')}: `;
    const all = `${plural(sum, 'choice')} over ${plural(maps.K, 'patch', 'patches')}, ${(sum / maps.K).toFixed(2)} a patch (budget ${maps.budget}), `
      + `${Math.min(...counts)} to ${Math.max(...counts)}; ${none} (${share(none)}) without an expert.`;
    const own = expert === null ? 0 : values.reduce((a, b) => a + b, 0);
    this.total.textContent = where + (expert === null ? all
      : `expert ${expert + 1} takes ${own} of ${plural(maps.K, 'patch', 'patches')} (${share(own)}) of “${maps.prompts[image]}”.`);
  },

  place(patch) {
    const { side } = this.now.maps;
    return `row ${Math.floor(patch / side) + 1}, column ${patch % side + 1}`;
  },

  // A patch: its experts now, over time, and over training.
  patchSays() {
    const { maps, image, t, layer, patch } = this.now;
    if (patch === null) {
      this.patchText.textContent = maps.bits ? 'Click a patch, or choose one with the arrow keys, to see its experts.' : 'Click a patch to see its count.';
      this.matrices.replaceChildren();
      return;
    }
    if (!maps.bits) {
      this.patchText.textContent = `Patch at ${this.place(patch)}: ${plural(maps.count(image, t, layer)[patch], 'expert')}.`;
      this.matrices.replaceChildren();
      return;
    }
    const found = maps.experts_of(image, t, layer, patch);
    this.patchText.textContent = `Patch at ${this.place(patch)}: ${plural(found.length, 'expert')}`
      + (found.length ? ` (${found.map(e => e + 1).join(', ')}).` : ', it goes on unchanged.');
    const over = [this.matrix('Its experts while the picture is drawn', maps.timesteps.map((time, n) => ({
      name: 't = ' + time.toFixed(2), own: maps.experts_of(image, n, layer, patch), here: n === t,
    })))];
    if (this.maps.length > 1) {
      over.push(this.matrix(`Its experts at t = ${maps.timesteps[t].toFixed(2)} as training went on`, this.maps.map((other, n) => {
        const b = other.prompts.indexOf(maps.prompts[image]), same = b >= 0 && other.bits && other.K === maps.K && t < other.T && layer < other.L;
        return { name: 'step ' + other.step.toLocaleString('en'), own: same ? other.experts_of(b, t, layer, patch) : [], here: n === this.now.n };
      })));
    }
    this.matrices.replaceChildren(...over.flat());
  },

  matrix(title, rows) {
    const { maps } = this.now, make = page.make, every = maps.experts > 16 ? 8 : 1;
    const head = make('tr', {}, make('td', {}), ...Array.from({ length: maps.experts }, (_, e) =>
      make('th', { scope: 'col', 'aria-label': `expert ${e + 1}` }, e % every && e ? '' : String(e + 1))), make('th', { scope: 'col' }, 'all'));
    const lines = rows.map(({ name, own, here }) => make('tr', here ? { class: 'here' } : {}, make('th', { scope: 'row' }, name),
      ...Array.from({ length: maps.experts }, (_, e) => own.includes(e) ? make('td', { class: 'on' }, '1') : make('td', {})),
      make('th', { class: 'sum' }, String(own.length))));
    const table = make('table', { class: 'matrix' }, make('thead', {}, head), make('tbody', {}, ...lines));
    return [make('h4', {}, title), make('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': title }, table)];
  },

  // Every layer and timestep of the picture, small; a click goes there.
  small(most) {
    const { maps, image, t, layer, expert } = this.now, make = page.make, key = `${maps.step} ${maps.L} ${maps.T}`;
    this.box.querySelector('.over').textContent = expert === null ? 'Every layer and timestep' : `Expert ${expert + 1}, every layer and timestep`;
    if (this.grid !== key) {
      this.grid = key;
      const head = make('tr', {}, make('td', {}), ...maps.timesteps.map(time => make('th', { scope: 'col' }, 't = ' + time.toFixed(2))));
      const lines = maps.layers.map((number, l) => make('tr', {}, make('th', { scope: 'row' }, 'layer ' + number), ...maps.timesteps.map((time, n) => {
        const button = make('button', { type: 'button', 'aria-label': `layer ${number}, t = ${time.toFixed(2)}`, 'data-at': `${l} ${n}` },
          make('canvas', { width: 96, height: 96 }));
        button.addEventListener('click', () => { Object.assign(this.state, { layer: l, time: n }); this.draw(); });
        return make('td', {}, button);
      })));
      this.multiples.replaceChildren(make('table', {}, make('thead', {}, head), make('tbody', {}, ...lines)));
    }
    const drawn = [key, image, expert, this.state.opacity, this.picture(maps.pictures[image]).complete].join();
    this.multiples.querySelectorAll('button').forEach(button => {
      const [l, n] = button.dataset.at.split(' ').map(Number);
      button.setAttribute('aria-pressed', String(l === layer && n === t));
      if (this.small_drawn === drawn) return;  // only the choice among them is another
      const values = expert === null ? maps.count(image, n, l) : maps.taken(image, n, l, expert);
      button.dataset.sum = values.reduce((a, b) => a + b, 0);
      this.paint(button.firstElementChild, values, most, this.state.opacity, n);
    });
    this.small_drawn = drawn;
  },

  asNumbers(values) {
    if (!this.numbers.open) return;
    const { side } = this.now.maps, make = page.make, line = n => Array.from({ length: side }, (_, c) => make('td', {}, String(values[n * side + c])));
    const head = make('tr', {}, make('td', {}), ...Array.from({ length: side }, (_, c) => make('th', { scope: 'col' }, String(c + 1))));
    const lines = Array.from({ length: side }, (_, n) => make('tr', {}, make('th', { scope: 'row' }, String(n + 1)), ...line(n)));
    this.numbers.querySelector('.scroll').replaceChildren(make('table', {}, make('thead', {}, head), make('tbody', {}, ...lines)));
  },

  key(event) {
    const { side } = this.now.maps, { patch } = this.now;
    const go = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === 'Escape') this.state.patch = null;
    else if (!go) return;
    else if (patch === null) this.state.patch = Math.floor(side / 2) * side + Math.floor(side / 2);
    else {
      const within = n => Math.max(0, Math.min(side - 1, n));
      this.state.patch = within(Math.floor(patch / side) + go[0]) * side + within(patch % side + go[1]);
    }
    event.preventDefault();
    this.draw();
  },
};
explorer.start(page.read('maps'));
