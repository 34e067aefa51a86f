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
