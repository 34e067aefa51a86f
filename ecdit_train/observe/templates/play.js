// The playground: asks for a drawing, and follows it frame by frame.
const play = {
  about: page.read('play'), frames: [], number: 0, seen: 0, shown: null, final: null, follow: true,

  start() {
    const find = id => document.getElementById(id);
    this.form = find('ask'); this.state = find('state'); this.unknown = find('unknown'); this.picture = find('picture');
    this.time = find('time'); this.film = find('film'); this.save = find('save'); this.empty = find('empty');
    const fields = this.form.elements;
    const say = () => ['guidance', 'steps'].forEach(name => {
      fields[name].nextElementSibling.textContent = name === 'guidance' && +fields[name].value === 1 ? '1 (off)' : fields[name].value;
    });
    say();
    this.form.addEventListener('input', say);
    this.form.addEventListener('submit', event => { event.preventDefault(); this.ask(); });
    fields.prompt.addEventListener('keydown', event => {
      if (event.key === 'Enter' && !event.shiftKey) { event.preventDefault(); this.form.requestSubmit(); }
    });
    // A knob that is let go of draws anew, once there is something to compare with.
    ['guidance', 'steps', 'seed', 'scope'].forEach(name => fields[name] && fields[name].addEventListener('change', () => {
      if (this.number && this.form.checkValidity()) this.ask();
    }));
    this.form.querySelectorAll('[data-prompt]').forEach(button => button.addEventListener('click', () => {
      fields.prompt.value = button.dataset.prompt;
      this.ask();
    }));
    find('other').addEventListener('click', () => { fields.seed.value = (+fields.seed.value || 0) + 1; this.ask(); });
    this.time.addEventListener('input', () => this.show(+this.time.value));
  },

  async ask() {
    const words = new URLSearchParams({ ...Object.fromEntries(new FormData(this.form)), key: this.about.key });
    let answer;
    try { answer = await (await fetch('start.json?' + words)).json(); } catch { return this.lost(); }
    if (answer.error) { this.state.textContent = answer.error; return; }
    Object.assign(this, { number: answer.drawing, seen: 0, frames: [], final: null, follow: true, failures: 0 });
    this.film.replaceChildren();
    this.save.hidden = true;
    this.state.textContent = 'reading the weights';
    this.listen(answer.drawing);
  },

  async listen(number) {
    while (number === this.number) {
      let answer;
      try {
        answer = await (await fetch('events.json?' + new URLSearchParams({ key: this.about.key, drawing: number, seen: this.seen }))).json();
        this.failures = 0;
      } catch {
        if (++this.failures > 5) return this.lost();
        await new Promise(done => setTimeout(done, 500));
        continue;
      }
      if (number !== this.number) return;
      if (answer.drawing !== number) { this.state.textContent = 'another window draws now'; return; }
      this.seen += answer.events.length;
      for (const event of answer.events) this.take(event);
      if (answer.events.length) this.refresh();
      if (['done', 'ended', 'error'].includes((answer.events.at(-1) || {}).kind)) return;
    }
  },

  lost() { this.state.textContent = 'ecdit play has ended: start it again in its terminal'; },

  take(event) {
    if (event.kind === 'begun') {
      Object.assign(this, { prompt: event.prompt, steps: event.steps });
      const near = event.unknown.map(u => `“${u.word}”` + (u.nearest ? ` (nearest: ${u.nearest})` : '')).join(', ');
      this.unknown.hidden = !event.unknown.length;
      this.unknown.textContent = event.unknown.length
        ? `No training caption had ${near}: nothing is known of what to draw for ${event.unknown.length > 1 ? 'these words' : 'this word'}.` : '';
    } else if (event.kind === 'frame') this.frames[event.place] = event;
    else if (event.kind === 'done') {
      this.final = event.picture;
      this.save.href = event.picture;
      this.save.hidden = false;
      this.state.textContent = `drawn in ${event.seconds.toFixed(1)} s`;
    } else this.state.textContent = event.kind === 'error' ? event.words : '';
  },

  // The picture at a place of the film; the explorer goes to the same timestep.
  show(place) {
    this.follow = place === this.frames.length - 1;
    if (this.about.sparse) explorer.state.time = place;
    this.refresh();
  },

  refresh() {
    const { frames } = this, most = frames.length - 1;
    if (most < 0) return;
    const place = this.follow ? most : Math.min(+this.time.value, most), last = place === most && this.final;
    this.time.max = most; this.time.value = place; this.time.disabled = most < 1;
    const t = 't = ' + frames[place].t.toFixed(2);
    this.time.setAttribute('aria-valuetext', t);
    this.time.nextElementSibling.textContent = last ? 'the picture' : t;
    this.empty.hidden = true;
    this.picture.hidden = false;
    this.picture.src = last ? this.final : frames[place].picture;
    this.picture.alt = `${this.prompt}, ${last ? 'finished' : 'on its way at ' + t}`;
    if (!this.final) this.state.textContent = `drawing, t = ${frames[most].t.toFixed(2)}`;
    while (this.film.children.length < frames.length) {
      const n = this.film.children.length;
      const button = page.make('button', { type: 'button', 'aria-label': 't = ' + frames[n].t.toFixed(2) }, page.make('img', { alt: '' }));
      button.addEventListener('click', () => { this.time.value = n; this.show(n); });
      this.film.append(button);
    }
    [...this.film.children].forEach((button, n) => {
      button.firstElementChild.src = frames[n].picture;
      button.setAttribute('aria-pressed', String(n === place));
    });
    if (!this.about.sparse) return;
    if (this.follow) explorer.state.time = place;
    const data = { steps: [this.maps()] };
    if (explorer.maps) explorer.update(data); else explorer.start(data);
  },

  // All frames so far as the explorer takes a file of routing maps.
  maps() {
    const { layers, experts, budget, side, step } = this.about, { frames } = this;
    const maps = new Maps({ layers, experts, budget, side, step, prompts: [this.prompt], timesteps: frames.map(f => f.t), chosen: null, counts: null,
      pictures: [this.final || frames.at(-1).picture], frames: frames.map(f => f.picture) });
    const parts = frames.map(f => Uint8Array.from(atob(f.chosen), c => c.charCodeAt(0)));
    maps.bits = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    parts.reduce((at, part) => { maps.bits.set(part, at); return at + part.length; }, 0);
    return maps;
  },
};
play.start();
