// What every page does: colours, sections that fold on a phone and open on paper, state that outlives an update.
const page = {
  read: name => { const at = document.getElementById('data-' + name); return at ? JSON.parse(at.textContent) : null; },
  keep: (name, value) => { try { localStorage.setItem('ecdit-' + name, value); } catch { /* a file may have no storage */ } },
  kept: name => { try { return localStorage.getItem('ecdit-' + name); } catch { return null; } },
  make: (tag, set = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(set)) {
      if (name in made && typeof value !== 'string') made[name] = value; else made.setAttribute(name, value);
    }
    made.append(...inside);
    return made;
  },
  short: value => {
    if (value === null || value === undefined) return '–';
    const size = Math.abs(value);
    if (size === 0) return '0';
    if (size < 1e-3 || size >= 1e9) return value.toExponential(2).replace(/\.?0+e/, 'e').replace(/e([+-])(\d)$/, 'e$10$2');
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + 'M';
    if (size >= 1e4 || Number.isInteger(value)) return Math.round(value).toLocaleString('en');
    return String(+value.toPrecision(4));
  },
};
document.documentElement.classList.add('js');
{
  const themes = ['', 'light', 'dark'], names = { '': 'as the system', light: 'light', dark: 'dark' };
  const button = document.getElementById('theme');
  const set = theme => {
    if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
    button.textContent = { '': '◐', light: '☀', dark: '☾' }[theme];
    button.setAttribute('aria-label', 'colours: ' + names[theme]);
    button.title = 'Colours: ' + names[theme];
    page.keep('theme', theme);
  };
  const now = page.kept('theme');
  let theme = themes.includes(now) ? now : '';
  set(theme);
  button.addEventListener('click', () => { theme = themes[(themes.indexOf(theme) + 1) % 3]; set(theme); });

  if (matchMedia('(max-width: 700px)').matches && !location.hash) {
    [...document.querySelectorAll('details.section:not([hidden])')].forEach((d, n) => { d.open = n < 2; });
  }
  document.querySelectorAll('.still').forEach(d => { d.open = false; });
  document.querySelectorAll('.places a').forEach(a => a.addEventListener('click', () => {
    document.querySelector(a.getAttribute('href')).open = true;
  }));
  let closed = [];
  addEventListener('beforeprint', () => {
    closed = [...document.querySelectorAll('.section:not([open]), .still:not([open])')];
    closed.forEach(d => { d.open = true; });
  });
  addEventListener('afterprint', () => closed.forEach(d => { d.open = false; }));
}
