// A served page asks for what has changed. Sliders, zooms, open sections and the place on the page stay as they are.
{
  const live = page.read('live'), at = document.getElementById('live');
  const ago = seconds => seconds < 90 ? `${Math.max(0, Math.round(seconds))} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min`
    : `${Math.round(seconds / 3600)} h`;
  // Seconds that the server's clock is ahead of this one.
  let ahead = live.now - Date.now() / 1000, wait = live.seconds, lost = false;
  const say = () => {
    const last = charts.columns.last;
    at.classList.toggle('lost', lost);
    at.textContent = lost ? 'the server does not answer; this is what it said last'
      : last === null ? 'live, no record yet' : `live, last record ${ago(Date.now() / 1000 + ahead - last)} ago`;
  };
  const put = (id, html) => {
    if (id === 'tiles') { document.getElementById(id).innerHTML = html; return; }
    const section = document.getElementById(id), inside = section.querySelector(':scope > .inside');
    section.hidden = !html;
    document.querySelector(`.places a[href="#${id}"]`).hidden = !html;
    const open = [...inside.querySelectorAll('details[id][open]')].map(d => d.id), focus = document.activeElement;
    const name = inside.contains(focus) && (focus.closest('[id]') || {}).id;
    inside.innerHTML = html;
    open.forEach(d => { const again = document.getElementById(d); if (again) again.open = true; });
    const again = name && document.getElementById(name);
    if (again) (again.querySelector('.plot') || again).focus({ preventScroll: true });
  };
  const records = part => {
    charts.set(part.data.curves);
    for (const id of ['learning', 'routing', 'speed']) {
      const old = [...document.querySelectorAll(`#${id} .chart[id]`)];
      const fresh = new DOMParser().parseFromString(part.sections[id], 'text/html'), found = [...fresh.querySelectorAll('.chart[id]')];
      const shape = figures => figures.map(f => f.id + f.querySelector(':scope > script').textContent.replace(/"log": ?(true|false)/, '')).join();
      if (shape(old) === shape(found)) continue;  // the same curves, with more points
      old.forEach(f => charts.all.delete(f.id));
      put(id, part.sections[id]);
      charts.start(document.getElementById(id));
    }
    charts.draw();
    put('tiles', part.sections.tiles);
    put('values', part.sections.values);
  };
  const take = parts => {
    for (const [name, part] of Object.entries(parts)) {
      live.stamps[name] = part.stamp;
      if (name === 'records') records(part);
      else if (name === 'routing' && explorer.box && part.data.maps) explorer.update(part.data.maps);
      else {
        Object.entries(part.sections).forEach(([id, html]) => put(id, html));
        if (name === 'samples') samples.start();
        if (name === 'routing') explorer.start(part.data.maps);
      }
    }
  };
  const ask = async () => {
    if (!document.hidden) {
      try {
        const reply = await fetch('update.json?' + new URLSearchParams(live.stamps), { cache: 'no-store' });
        if (!reply.ok) throw new Error(reply.status);
        const found = await reply.json();
        ahead = found.now - Date.now() / 1000;
        take(found.parts);
        lost = false; wait = live.seconds;
      } catch (error) {
        if (!(error instanceof TypeError) && !/^\d+$/.test(error.message)) console.error(error);
        lost = true; wait = Math.min(15, wait * 1.6);
      }
    }
    say();
    setTimeout(ask, wait * 1000);
  };
  document.addEventListener('visibilitychange', say);
  say();
  setTimeout(ask, wait * 1000);
}
